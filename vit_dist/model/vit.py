"""The Vision Transformer: images to logits.

What is notable in this ViT (Dosovitskiy et al. 2021, arXiv:2010.11929); names in backquotes are keys of `config.Model`:

- Images and patches may be oblong: `image_size` and `patch_size` are one number or (height, width). The patches are
  embedded by a dense layer on their pixels, which equals a convolution whose stride is its window. Blocks are pre-norm.
- `pool` makes one vector of the tokens: "cls" takes the class token, as in the paper; "mean" averages the patches (Zhai
  et al. 2022, arXiv:2106.04560; Beyer et al. 2022, arXiv:2205.01580); "cls_mean" takes both; "map" attends to the
  patches with one learned query, followed by an MLP (Zhai et al.). `pool_norm` says whether a norm comes before or
  after it, and `output_projection` adds a layer without bias, as in CLIP.
- `norm` is "layernorm" or "rmsnorm"; `embedding_norm` adds one before the blocks.
- `position` is "learned", "sincos2d", fixed sines (Chen et al. 2021, MoCo v3, arXiv:2104.02057), "rope2d", by which
  queries and keys are turned (DINOv3, arXiv:2508.10104), or "none". `cls_position=False` gives the class token no
  position (Touvron et al. 2022, DeiT-III, arXiv:2204.07118).
- `registers` are further learned tokens, which take part in attention and are not pooled (Darcet et al. 2024,
  arXiv:2309.16588).
- `layer_scale` multiplies each branch by a learned factor per channel (Touvron et al. 2021, CaiT, arXiv:2103.17239).
- `qk_norm` normalises queries and keys, and `parallel` runs attention and MLP on the same norm, side by side (both
  Dehghani et al. 2023, ViT-22B, arXiv:2302.05442).
- `activation` is "gelu", "gelu_tanh", "quick_gelu", or "swiglu", which gates the MLP (Shazeer 2020, arXiv:2002.05202).
- `drop_path` drops residual branches of single examples (Huang et al. 2016, stochastic depth, arXiv:1603.09382), at a
  rate that rises with depth or is constant (`drop_path_schedule`). Dropout has separate rates for embeddings,
  attention weights, projections and the rest.
- The head starts at zero (`head_zero_init`); `pre_logits` adds a tanh layer before it. Parameters and logits are
  float32, with `dtype` for the arithmetic between them.
- `scan` stacks the parameters of all blocks along a leading axis [depth, ...] and runs them by `jax.lax.scan`: the
  program, the number of arrays and the compile time stay small at any depth. Without it, each block has arrays of its
  own in a Python loop: the same numbers, a longer compilation, and a faster step, which copies nothing out of a stack.
  "auto" decides by platform and depth, see `model.choices`.
- `remat` computes activations again in the backward pass to save memory (Chen et al. 2016, arXiv:1604.06174): "names"
  keeps what spares running a dense product twice, "block" nothing inside a block.
- With a mesh axis `context` the tokens are split over devices from the embedding to the pooling, for ring attention
  (Liu et al. 2023, arXiv:2310.01889) or all-to-all attention (Jacobs et al. 2023, arXiv:2309.14509); see
  `model.context`. Padding makes the number of tokens divide. It is masked in attention and pooling, and each device
  embeds its own tokens only.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.mesh import layout
from vit_dist.model import choices, context, kernels
from vit_dist.model.block import Block, first_blocks, run_blocks
from vit_dist.model.layers import INITIALIZERS, Dense, dropout, lecun_normal, split_key, zeros
from vit_dist.model.lora import attach
from vit_dist.model.norm import Norm
from vit_dist.model.parameters import cast_and_gather, make_parameter
from vit_dist.model.pooling import AttentionPool, mean, token_mask
from vit_dist.model.position import Rotation, add_to_each, random_stretch, rope2d, sincos2d
from vit_dist.model.shape import shape_of


class ViT(nnx.Module):
    """The model: `ViT("B/16", image_size=224, num_classes=1000, rngs=nnx.Rngs(0))(images)` returns logits.

    Args:
      variant: a name such as "B/16", or None if the settings give width, depth, mlp, heads and patch_size.
      rngs: the source of randomness for the parameters.
      lora: the adapters of the blocks' dense layers; None: there are none.
      **settings: the fields of `config.Model`.

    Raises:
      ConfigError: a setting is unknown or none of its options, or the numbers do not fit each other, such as an image
        whose size is no multiple of the patch's.
    """

    def __init__(self, variant: str | None = None, *, rngs: nnx.Rngs, lora: config.Lora | None = None, **settings: Any):
        # `resolve` checks the config of a run; only its model matters here.
        model = config.resolve({"total_steps": 1, "model": {"variant": variant, **settings}}).model
        model = choices.decided(model, *kernels.device())
        shape = shape_of(model)
        self.model, self.shape = model, shape
        kernel = INITIALIZERS[model.kernel_init]
        pixels = shape.patch[0] * shape.patch[1] * shape.channels
        # A convolution whose stride is its window is a linear map of each patch's pixels (row, column, channel).
        self.patch = Dense((pixels,), (shape.width,), (None, "width"), rngs=rngs, initializer=lecun_normal)

        def tokens(count: int, std: float) -> nnx.Param:
            return make_parameter(rngs, initializers.normal(std), (count, shape.width), (None, "width"))

        # The class token starts at zero if it has a position, which is random; else the token itself is random.
        initializer = initializers.zeros if model.cls_position else initializers.normal(model.position_std)
        self.cls = make_parameter(rngs, initializer, (shape.width,), ("width",)) if shape.class_token else None
        # With `cls_position` the first learned position is the class token's; other kinds have none for it.
        positions = shape.patches + (shape.class_token and model.cls_position)
        self.position = tokens(positions, model.position_std) if model.position == "learned" else None
        self.registers = tokens(model.registers, 0.02) if model.registers else None

        def norm(size: int, present: bool) -> Norm | None:
            return Norm(model, size, "width", rngs=rngs) if present else None

        self.embedding_norm = norm(shape.width, model.embedding_norm != "none")
        keys = jax.random.split(rngs.params(), shape.depth)

        def block(key: jax.Array) -> Block:
            made, own = Block(model, shape, nnx.Rngs(key)), nnx.Rngs(jax.random.fold_in(key, 1))
            attach(made, lora or config.Lora(), own)
            return made

        # The vmap draws what one block at a time would.
        self.blocks = jax.vmap(block)(keys) if model.scan else nnx.List(block(key) for key in keys)
        self.norm = norm(shape.width, model.pool_norm in ("before", "both"))
        self.pool = AttentionPool(model, shape, rngs) if model.pool == "map" else None
        self.pooled_norm = norm(shape.pooled, model.pool_norm in ("after", "both"))

        def dense(inputs: int, outputs: int | None, name: str | None = None, **options: Any) -> Dense | None:
            options = {"initializer": kernel, **options}
            return Dense((inputs,), (outputs,), (name, None), rngs=rngs, **options) if outputs else None

        # After a further layer, which none of the mesh's axes splits, the head's input has no logical name.
        projected, last = model.output_projection or shape.pooled, model.pre_logits
        self.output_projection = dense(shape.pooled, model.output_projection, "width", bias=None)
        self.pre_logits = dense(projected, last, None if model.output_projection else "width")
        name = None if last or model.output_projection else "width"
        head_kernel = zeros if model.head_zero_init else kernel
        self.head = dense(last or projected, shape.classes, name, initializer=head_kernel, bias=model.head_bias)

    def __call__(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns the logits of images, or without a head their features.

        Args:
          images: [B, H, W, C], floats, normalised.
          key: the randomness of dropout and stochastic depth; None evaluates, without either.

        Returns:
          [B, classes] or [B, features], float32.

        Raises:
          ConfigError: the images have another size, number of channels or dtype than the model expects.
        """
        x = self.features(images, key)
        return x if self.head is None else self.head(x)

    def features(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns what the head classifies, [B, features], float32; the arguments are those of a call."""
        return self.pooled(self.tokens(images, key))

    def tokens(self, images: jax.Array, key: jax.Array | None = None, blocks: int | None = None) -> jax.Array:
        """Returns the tokens [B, N, D] after the first `blocks` blocks (None: all), before any norm that follows.

        Images and key are those of a call. Padding may follow the tokens, as in `embed`.
        """
        keys = split_key(key, 3)
        x, rotation = self.embedded(images, keys[0], keys[2])
        return self.encode(x, keys[1], rotation, blocks)

    def embedded(
        self, images: jax.Array, dropout_key: jax.Array | None = None, rotation_key: jax.Array | None = None
    ) -> tuple[jax.Array, Rotation | None]:
        """Returns what the first block takes: tokens [B, N, D] of images as for a call, and the blocks' rotation."""
        expected = (*self.shape.image, self.shape.channels)
        if images.shape[1:] != expected or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ConfigError(
                f"images: expected [B, {', '.join(map(str, expected))}] of normalised floats, found "
                f"{list(images.shape)} of {images.dtype}; resize and normalise them first"
            )
        x = self.embed(images.astype(self.model.dtype))
        x = dropout(x, self.model.embedding_dropout, dropout_key)
        if self.model.embedding_norm == "tokens":
            assert self.embedding_norm is not None
            x = self.embedding_norm(x)
        return x, self._rotation(x, rotation_key)

    def pooled(self, x: jax.Array) -> jax.Array:
        """Returns what the head classifies, [B, features], float32, of tokens [B, N, D] that the blocks put out."""
        x = self.pool_tokens(x)
        if self.pooled_norm is not None:
            x = self.pooled_norm(x)
        if self.output_projection is not None:
            x = self.output_projection(x)
        if self.pre_logits is not None:
            x = jnp.tanh(self.pre_logits(x))
        return x.astype(jnp.float32)

    def embed(self, images: jax.Array) -> jax.Array:
        """Embeds images [B, H, W, C] as tokens [B, N, D]: class token, registers, then patches row by row.

        Padding may follow, with embeddings of zero: if the mesh splits tokens, or attention needs an even number.
        """
        x = patchify(images, self.shape.patch)
        table = self._added_embeddings(x)
        special, shards = self.shape.special, layout.shard_count("tokens")
        padding = self._padded_length(shards) - self.shape.tokens
        if shards == 1:
            x = jnp.pad(self._embed_patches(x), ((0, 0), (special, padding), (0, 0)))
            table = jnp.pad(table, ((0, padding), (0, 0)))
        else:
            # The pixels are padded and split before the dense layer, so that a device embeds its own tokens only.
            x = layout.reshard(jnp.pad(x, ((0, 0), (special, padding), (0, 0))), "batch", "tokens", None)
            x = jnp.where(token_mask(special, self.shape.tokens, x)[:, None], self._embed_patches(x), 0)
            table = layout.reshard(jnp.pad(table, ((0, padding), (0, 0))), "tokens", None)
        return add_to_each(x, table)

    def _embed_patches(self, x: jax.Array) -> jax.Array:
        x = self.patch(x)
        if self.model.embedding_norm == "patches":
            assert self.embedding_norm is not None
            x = self.embedding_norm(x)
        return x

    def _rotation(self, x: jax.Array, key: jax.Array | None) -> Rotation | None:
        """Returns the rotation of queries and keys for tokens x [B, N, D], split like these; None without `rope2d`."""
        model, shape = self.model, self.shape
        if model.position != "rope2d":
            return None
        stretch = None
        if key is not None and (model.rope_jitter > 1 or model.rope_rescale > 1):
            stretch = random_stretch(key, model.rope_jitter, model.rope_rescale)
        special, after = shape.special, x.shape[1] - shape.tokens
        size = shape.width // shape.heads
        rotation = rope2d(shape.grid, size, model.rope_base, stretch, before=special, after=after)
        cosine, sine = (layout.reshard(one, "tokens", None) for one in rotation)
        return cosine, sine

    def _padded_length(self, shards: int) -> int:
        """Returns the number of tokens with padding, over so many shards of them."""
        if shards > 1:
            return context.padded_length(self.shape.tokens, shards)
        return kernels.padded_length(self.model, *kernels.device(), head_shards=layout.shard_count("heads"))

    def _added_embeddings(self, x: jax.Array) -> jax.Array:
        """Returns the embeddings [N, D] to add to those of the pixels, in the dtype of x, for the layout of x."""
        split, dtype = layout.spec_of(x), x.dtype
        if self.position is not None:
            position = cast_and_gather(self.position, dtype, split)
        else:
            table = jnp.zeros((self.shape.patches, self.shape.width))
            if self.model.position == "sincos2d":
                table = sincos2d(*self.shape.grid, self.shape.width)
            position = layout.gathered(table.astype(dtype), split)
        cls_positions = position.shape[0] - self.shape.patches  # 1 if the class token has a learned position, else 0
        special = []
        if self.cls is not None:
            cls = cast_and_gather(self.cls, dtype, split)[None]
            special.append(cls + position[:1] if cls_positions else cls)
        if self.registers is not None:
            special.append(cast_and_gather(self.registers, dtype, split))
        return jnp.concatenate([*special, position[cls_positions:]])

    def pool_tokens(self, x: jax.Array) -> jax.Array:
        """Normalises and pools tokens [B, N, D]: [B, D], or [B, 2 D] for `pool=cls_mean`."""
        pool, patches = self.model.pool, (self.shape.special, self.shape.tokens)  # without registers (Darcet et al.)
        if self.pool is not None:
            return self.pool(x if self.norm is None else self.norm(x), *patches)
        spans = {"cls": [(0, 1)], "mean": [patches], "cls_mean": [(0, 1), patches]}[pool]
        return jnp.concatenate([mean(x, *span, self.norm) for span in spans], -1)

    def encode(
        self, x: jax.Array, key: jax.Array | None, rotation: Rotation | None = None, blocks: int | None = None
    ) -> jax.Array:
        """Applies all blocks, or the first `blocks`: [B, N, D] -> [B, N, D]; `rotation` is as for a block."""
        depth = self.shape.depth
        first = 0 if self.model.drop_path_schedule == "linear" else self.model.drop_path
        rates = jnp.linspace(first, self.model.drop_path, depth) if self.model.drop_path else None
        keys = None if key is None or not self._is_random() else jax.random.split(key, depth)
        if blocks is None:
            return run_blocks(self.blocks, x, rates, keys, rotation, self.model)
        rates, keys = (None if values is None else values[:blocks] for values in (rates, keys))
        return run_blocks(first_blocks(self.blocks, blocks), x, rates, keys, rotation, self.model)

    def _is_random(self) -> bool:
        model = self.model
        return any((model.dropout, model.projection_dropout, model.attention_dropout, model.drop_path))


def patchify(images: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """Cuts images [B, H, W, C] into patches [B, patches, pixels], row by row; pixels are (row, column, channel)."""
    batch, rows, columns = images.shape[0], images.shape[1] // patch[0], images.shape[2] // patch[1]
    grid = (batch, rows, patch[0], columns, patch[1], images.shape[3])
    x = jax.lax.reshape(images, grid, out_sharding=layout.spec("batch", *(None,) * 5))
    x = x.transpose(0, 1, 3, 2, 4, 5)
    pixels = patch[0] * patch[1] * images.shape[3]
    return jax.lax.reshape(x, (batch, rows * columns, pixels), out_sharding=layout.spec("batch", None, None))


def parameter_count(model: nnx.Module) -> int:
    """Returns the number of learned values of a model."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
