"""The Vision Transformer: images to logits.

What is notable in this ViT (Dosovitskiy et al. 2021, arXiv:2010.11929); names in backquotes are keys of `config.Model`:

- Images and patches may be oblong: `image_size` and `patch_size` are one number or (height, width). The patches are
  embedded by a dense layer on their pixels, which equals a convolution whose stride is its window. Blocks are pre-norm.
- `pool` makes one vector of the tokens: "cls" takes the class token, as in the paper; "mean" averages the patches (Zhai
  et al. 2022, arXiv:2106.04560; Beyer et al. 2022, arXiv:2205.01580); "map" attends to the patches with one learned
  query, followed by an MLP (Zhai et al.).
- `position` is "learned" or "sincos2d", fixed sines (Chen et al. 2021, MoCo v3, arXiv:2104.02057). `cls_position=False`
  gives the class token no position (Touvron et al. 2022, DeiT-III, arXiv:2204.07118).
- `registers` are further learned tokens, which take part in attention and are not pooled (Darcet et al. 2024,
  arXiv:2309.16588).
- `layer_scale` multiplies each branch by a learned factor per channel (Touvron et al. 2021, CaiT, arXiv:2103.17239).
- `qk_norm` normalises queries and keys, and `parallel` runs attention and MLP on the same norm, side by side (both
  Dehghani et al. 2023, ViT-22B, arXiv:2302.05442).
- `activation` is "gelu", "gelu_tanh", or "swiglu", which gates the MLP (Shazeer 2020, arXiv:2002.05202).
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
from vit_dist.model.attention import attend
from vit_dist.model.block import Block, run_blocks
from vit_dist.model.layers import (
    INITIALIZERS,
    Dense,
    Mlp,
    Norm,
    cast_and_gather,
    dropout,
    lecun_normal,
    make_parameter,
    split_key,
    zeros,
)
from vit_dist.model.position import add_to_each, sincos2d
from vit_dist.model.shape import Shape, shape_of


class AttentionPool(nnx.Module):
    """Attends with one learned query, then applies an MLP: [B, N, D] -> [B, D] (Zhai et al. 2022, arXiv:2106.04560)."""

    def __init__(self, model: config.Model, shape: Shape, rngs: nnx.Rngs):
        common: dict[str, Any] = {"rngs": rngs, "initializer": INITIALIZERS[model.kernel_init]}
        names, size = ("width", "heads", None), shape.width // shape.heads
        self.probe = make_parameter(rngs, initializers.normal(0.02), (1, shape.width), (None, "width"))
        self.query = Dense((shape.width,), (shape.heads, size), names, **common)
        self.key_value = Dense((shape.width,), (shape.heads, size), names, count=2, **common)
        self.projection = Dense((shape.heads, size), (shape.width,), ("heads", None, "width"), **common)
        self.norm = Norm(shape.width, "width", rngs=rngs)
        self.mlp = Mlp(shape.width, shape.mlp, activation=shape.activation, dropout=0.0, **common)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Pools the tokens of x [B, N, D] for which `mask`, bool [N], is True; None pools all."""
        split = layout.spec_of(x, 1, None, None)  # by examples only
        probe = layout.broadcast(cast_and_gather(self.probe, x.dtype, split), (x.shape[0], 1, x.shape[2]), split)
        key, value = self.key_value.each(x)
        # The weights of one query, [B, H, 1, N], are small: a fused kernel would gain nothing.
        x = self.projection(layout.joined(attend(self.query(probe), key, value, "xla", mask=mask), 2))
        return (x + self.mlp(self.norm(x), None))[:, 0]


class ViT(nnx.Module):
    """The model: `ViT("B/16", image_size=224, num_classes=1000, rngs=nnx.Rngs(0))(images)` returns logits.

    Args:
      variant: a name such as "B/16", or None if the settings give width, depth, mlp, heads and patch_size.
      rngs: the source of randomness for the parameters.
      **settings: the fields of `config.Model`.

    Raises:
      ConfigError: a setting is unknown or none of its options, or the numbers do not fit each other, such as an image
        whose size is no multiple of the patch's.
    """

    def __init__(self, variant: str | None = None, *, rngs: nnx.Rngs, **settings: Any):
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

        has_class = model.pool == "cls"
        # The class token starts at zero if it has a position, which is random; else the token itself is random.
        initializer = initializers.zeros if model.cls_position else initializers.normal(model.position_std)
        self.cls = make_parameter(rngs, initializer, (shape.width,), ("width",)) if has_class else None
        # With `cls_position` the first learned position is the class token's; "sincos2d" has none for it.
        positions = shape.patches + (has_class and model.cls_position)
        self.position = tokens(positions, model.position_std) if model.position == "learned" else None
        self.registers = tokens(model.registers, 0.02) if model.registers else None
        keys = jax.random.split(rngs.params(), shape.depth)
        blocks = jax.vmap(
            lambda key: Block(model, shape, nnx.Rngs(key))
        )  # draws the same numbers as one block at a time
        self.blocks = blocks(keys) if model.scan else nnx.List(Block(model, shape, nnx.Rngs(key)) for key in keys)
        self.norm = Norm(shape.width, "width", rngs=rngs)
        self.pool = AttentionPool(model, shape, rngs) if model.pool == "map" else None
        # The size and the logical name of the head's input.
        hidden, name = (model.pre_logits, None) if model.pre_logits else (shape.width, "width")
        names = ("width", None)
        self.pre_logits = (
            Dense((shape.width,), (hidden,), names, rngs=rngs, initializer=kernel) if model.pre_logits else None
        )
        head_kernel = zeros if model.head_zero_init else kernel
        self.head = Dense(
            (hidden,), (shape.classes,), (name, None), rngs=rngs, initializer=head_kernel, bias=model.head_bias
        )

    def __call__(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns the logits of images.

        Args:
          images: [B, H, W, C], floats, normalised.
          key: the randomness of dropout and stochastic depth; None evaluates, without either.

        Returns:
          [B, classes], float32.

        Raises:
          ConfigError: the images have another size, number of channels or dtype than the model expects.
        """
        expected = (*self.shape.image, self.shape.channels)
        if images.shape[1:] != expected or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ConfigError(
                f"images: expected [B, {', '.join(map(str, expected))}] of normalised floats, found "
                f"{list(images.shape)} of {images.dtype}; resize and normalise them first"
            )
        keys = split_key(key, 2)
        x = self.embed(images.astype(self.model.dtype))
        x = dropout(x, self.model.embedding_dropout, keys[0])
        x = self.pool_tokens(self.encode(x, keys[1]))
        if self.pre_logits is not None:
            x = jnp.tanh(self.pre_logits(x))
        return self.head(x.astype(jnp.float32))

    def embed(self, images: jax.Array) -> jax.Array:
        """Embeds images [B, H, W, C] as tokens [B, N, D]: class token, registers, then patches row by row.

        Padding may follow, with embeddings of zero: if the mesh splits tokens, or attention needs an even number.
        """
        x = patchify(images, self.shape.patch)
        table = self._added_embeddings(x)
        special, shards = self.shape.special, layout.shard_count("tokens")
        padding = self._padded_length(shards) - self.shape.tokens
        if shards == 1:
            x = jnp.pad(self.patch(x), ((0, 0), (special, padding), (0, 0)))
            table = jnp.pad(table, ((0, padding), (0, 0)))
        else:
            # The pixels are padded and split before the dense layer, so that a device embeds its own tokens only.
            x = layout.reshard(jnp.pad(x, ((0, 0), (special, padding), (0, 0))), "batch", "tokens", None)
            x = jnp.where(_token_mask(special, self.shape.tokens, x)[:, None], self.patch(x), 0)
            table = layout.reshard(jnp.pad(table, ((0, padding), (0, 0))), "tokens", None)
        return add_to_each(x, table)

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
            position = layout.gathered(jnp.asarray(sincos2d(*self.shape.grid, self.shape.width), dtype), split)
        cls_positions = position.shape[0] - self.shape.patches  # 1 if the class token has a learned position, else 0
        special = []
        if self.cls is not None:
            cls = cast_and_gather(self.cls, dtype, split)[None]
            special.append(cls + position[:1] if cls_positions else cls)
        if self.registers is not None:
            special.append(cast_and_gather(self.registers, dtype, split))
        return jnp.concatenate([*special, position[cls_positions:]])

    def pool_tokens(self, x: jax.Array) -> jax.Array:
        """Normalises and pools tokens [B, N, D] to the head's input [B, D]."""
        # Registers and padding are left out (Darcet et al. 2024).
        start, stop = (0, 1) if self.cls is not None else (self.shape.special, self.shape.tokens)
        split = layout.shard_count("tokens") > 1
        mask = _token_mask(start, stop, x) if split else None
        if not split:
            x = x[:, start:stop]
        if self.pool is not None:
            return self.pool(self.norm(x), mask)
        # The mean of normalised tokens is scaled and shifted, instead of every token. Without the barriers XLA's GPU
        # compiler stores all tokens, and then their gradients, in float32.
        barrier = jax.lax.optimization_barrier
        x = barrier(self.norm.normalise(barrier(x))).astype(jnp.float32)
        if mask is not None:
            x = jnp.where(mask[:, None], x, 0)
        total = jax.lax.reduce_sum(x, (1,), out_sharding=layout.spec("batch", None))
        return self.norm.affine(total / (stop - start)).astype(self.model.dtype)

    def encode(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Applies all blocks: [B, N, D] -> [B, N, D]."""
        depth = self.shape.depth
        first = 0 if self.model.drop_path_schedule == "linear" else self.model.drop_path
        rates = jnp.linspace(first, self.model.drop_path, depth) if self.model.drop_path else None
        keys = None if key is None or not self._is_random() else jax.random.split(key, depth)

        return run_blocks(self.blocks, x, rates, keys, self.model)

    def _is_random(self) -> bool:
        model = self.model
        return any((model.dropout, model.projection_dropout, model.attention_dropout, model.drop_path))


def _token_mask(start: int, stop: int, x: jax.Array) -> jax.Array:
    """Returns a mask, bool [N], that is True from `start` to before `stop`, split like the tokens of x [B, N, D]."""
    number = jax.lax.broadcasted_iota(jnp.int32, (x.shape[1],), 0, out_sharding=layout.spec("tokens"))
    return (start <= number) & (number < stop)


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
