"""The Vision Transformer: images to logits.

`ViT` is a Flax NNX module whose blocks are one module with parameters stacked along a leading axis [depth, ...], run
by `jax.lax.scan`: the compiled program, the number of arrays and the time to compile stay small whatever the depth.
With `scan=False` each block has arrays of its own and the loop is Python's. The numbers are the same; compiling takes
longer, and a step is quicker by the copies in and out of the stack.

Between the embedding and the pooling a mesh may split the tokens of an image (`context`). They are then padded to a
number that divides: padding is no key in attention and no part of what is pooled, and no device embeds a token that
is not its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers

from vit_dist import config
from vit_dist.config import ConfigError, nearest_multiples, pair
from vit_dist.mesh import layout
from vit_dist.model import context, variants
from vit_dist.model.attention import Attention, attend
from vit_dist.model.layers import (
    Dense,
    Mlp,
    Norm,
    Scale,
    drop_path,
    dropout,
    lecun_normal,
    make_parameter,
    normal,
    ready,
    split_key,
    xavier_uniform,
    zeros,
)
from vit_dist.model.position import sincos2d

SAVED = ("qkv", "attention", "mlp", "residual", "scaled")  # what `remat="names"` keeps: every dense product's result
KERNELS = {"xavier_uniform": xavier_uniform, "lecun_normal": lecun_normal, "normal": normal}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The numbers of one Vision Transformer, every default filled in."""

    width: int
    depth: int
    mlp: int
    heads: int
    activation: str
    parallel: bool
    qk_norm: bool
    image: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    classes: int
    special: int  # tokens that are no patches, the first ones: the class token, then registers

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.special + self.patches


def shape_of(model: config.Model) -> Shape:
    """Fills in what the variant says and checks that the numbers fit each other; raises `ConfigError`."""
    variant, patch = variants.parse(model.variant) if model.variant else (None, None)
    numbers = {}
    for name in ("width", "depth", "mlp", "heads", "activation", "parallel", "qk_norm"):
        own = getattr(model, name)
        numbers[name] = own if own is not None else getattr(variant or variants.PLAIN, name)
        if numbers[name] is None:
            raise ConfigError(f"model.{name}: not set, and model.variant names no size; set one of them")
    size = model.patch_size if model.patch_size is not None else patch
    if size is None:
        raise ConfigError("model.patch_size: not set, and model.variant names none; set one of them")
    if model.num_classes is None:
        raise ConfigError("model.num_classes: not set")
    image, patches = pair(model.image_size), pair(size)
    for side, extent, of in zip(("height", "width"), image, patches, strict=True):
        if extent % of:
            near = nearest_multiples(extent, of)
            raise ConfigError(f"model.image_size: {side} {extent} is not a multiple of the patch's {of}; take {near}")
    if numbers["width"] % numbers["heads"]:
        near = nearest_multiples(numbers["width"], numbers["heads"])
        raise ConfigError(f"model.width: {numbers['width']} does not divide by {numbers['heads']} heads; take {near}")
    if model.position == "sincos2d" and numbers["width"] % 4:
        raise ConfigError(f"model.width: {numbers['width']} must divide by 4 for model.position=sincos2d")
    numbers |= {"channels": model.channels, "classes": model.num_classes}
    special = (model.pool == "cls") + model.registers
    return Shape(**numbers, image=image, patch=patches, special=special)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `parallel`, both on one norm at once (ViT-22B)."""

    def __init__(self, model: config.Model, shape: Shape, rngs: nnx.Rngs):
        common: dict[str, Any] = {"rngs": rngs, "initializer": KERNELS[model.kernel_init]}
        self.parallel = shape.parallel
        self.norm1 = Norm(shape.width, "width", rngs=rngs)
        self.attention = Attention(
            shape.width,
            shape.heads,
            **common,
            qkv_bias=model.qkv_bias,
            projection_bias=model.projection_bias,
            qk_norm=shape.qk_norm,
            attention_dropout=model.attention_dropout,
            projection_dropout=model.dropout if model.projection_dropout is None else model.projection_dropout,
            implementation=model.attention,
            tokens=shape.tokens,
            across=model.context_attention,
        )
        self.norm2 = None if shape.parallel else Norm(shape.width, "width", rngs=rngs)
        self.mlp = Mlp(shape.width, shape.mlp, activation=shape.activation, dropout=model.dropout, **common)
        scale = model.layer_scale
        self.scale1 = Scale(shape.width, scale, rngs=rngs) if scale is not None else None
        self.scale2 = Scale(shape.width, scale, rngs=rngs) if scale is not None else None

    def __call__(self, x: jax.Array, path_rate: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """x: [B, N, D]; path_rate: the probability that an example leaves out a branch of this block; None: never."""
        keys = split_key(key, 4)
        h = self.norm1(x)
        attended = self.attention(h, keys[0])
        attended = drop_path(self.scale1(attended) if self.scale1 is not None else attended, path_rate, keys[1])
        if self.norm2 is not None:
            x = checkpoint_name(x + attended, "residual")
            h = self.norm2(x)
        else:
            x = x + attended
        y = self.mlp(h, keys[2])
        return x + drop_path(self.scale2(y) if self.scale2 is not None else y, path_rate, keys[3])


class AttentionPool(nnx.Module):
    """One learned query over the tokens `seen`, then an MLP: [B, N, D] -> [B, D] (Zhai et al. 2022, arXiv:2106.04560).

    seen: bool [N]; None: all.
    """

    def __init__(self, model: config.Model, shape: Shape, rngs: nnx.Rngs):
        common: dict[str, Any] = {"rngs": rngs, "initializer": KERNELS[model.kernel_init]}
        names, size = ("width", "heads", None), shape.width // shape.heads
        self.probe = make_parameter(rngs, initializers.normal(0.02), (1, shape.width), (None, "width"))
        self.query = Dense((shape.width,), (shape.heads, size), names, **common)
        self.key_value = Dense((shape.width,), (2, shape.heads, size), ("width", None, "heads", None), **common)
        self.projection = Dense((shape.heads, size), (shape.width,), ("heads", None, "width"), **common)
        self.norm = Norm(shape.width, "width", rngs=rngs)
        self.mlp = Mlp(shape.width, shape.mlp, activation=shape.activation, dropout=0.0, **common)

    def __call__(self, x: jax.Array, seen: jax.Array | None) -> jax.Array:
        split = layout.of(x, 1, None, None)  # by examples alone
        probe = layout.broadcast(ready(self.probe, x.dtype, split), (x.shape[0], 1, x.shape[2]), split)
        key_value = self.key_value(x)
        # One query: its weights [B, H, 1, N] are small, and nothing is to be had from a fused kernel.
        x = self.projection(attend(self.query(probe), key_value[:, :, 0], key_value[:, :, 1], "xla", seen=seen))
        return (x + self.mlp(self.norm(x), None))[:, 0]


class ViT(nnx.Module):
    """`ViT("B/16", image_size=224, num_classes=1000, rngs=nnx.Rngs(0))`; keywords are those of `config.Model`.

    Raises `ConfigError` for an unknown keyword, a value that is none of its options, and numbers that do not fit each
    other, such as an image that is no multiple of the patch.
    """

    def __init__(self, variant: str | None = None, *, rngs: nnx.Rngs, **settings: Any):
        # `resolve` checks whole runs; here the run is nothing but its model.
        model = config.resolve({"total_steps": 1, "model": {"variant": variant, **settings}}).model
        shape = shape_of(model)
        self.model, self.shape = model, shape
        kernel = KERNELS[model.kernel_init]
        pixels = shape.patch[0] * shape.patch[1] * shape.channels
        # A convolution whose stride is its window is a linear map of each patch's pixels (row, column, channel).
        self.patch = Dense((pixels,), (shape.width,), (None, "width"), rngs=rngs, initializer=lecun_normal)

        def tokens(count: int, std: float) -> nnx.Param:
            return make_parameter(rngs, initializers.normal(std), (count, shape.width), (None, "width"))

        has_class = model.pool == "cls"
        # Without a position of its own, which is drawn, the class token is: it would begin as a vector of zeros.
        drawn = initializers.zeros if model.cls_position else initializers.normal(model.position_std)
        self.cls = make_parameter(rngs, drawn, (shape.width,), ("width",)) if has_class else None
        # The first learned position is the class token's, unless it has none; sines have none for it.
        places = shape.patches + (has_class and model.cls_position)
        self.position = tokens(places, model.position_std) if model.position == "learned" else None
        self.registers = tokens(model.registers, 0.02) if model.registers else None
        keys = jax.random.split(rngs.params(), shape.depth)
        blocks = jax.vmap(lambda key: Block(model, shape, nnx.Rngs(key)))  # the same draws as one block at a time
        self.blocks = blocks(keys) if model.scan else nnx.List(Block(model, shape, nnx.Rngs(key)) for key in keys)
        self.norm = Norm(shape.width, "width", rngs=rngs)
        self.pool = AttentionPool(model, shape, rngs) if model.pool == "map" else None
        # What the head sees: its size and its name in the layout.
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
        """images [B, H, W, C] of float, normalised -> logits [B, classes] of float32.

        key: the randomness of dropout and stochastic depth; None evaluates, without either. Raises `ConfigError` for
        images of another size, number of channels or kind than the model was made for.
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
        x = self.pooled(self.norm(self.encode(x, keys[1])))
        if self.pre_logits is not None:
            x = jnp.tanh(self.pre_logits(x))
        return self.head(x.astype(jnp.float32))

    def embed(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> tokens [B, N, D]: the class token where there is one, registers, then patches row by row.

        Where the mesh splits tokens, padding follows them, whose embeddings are zeros.
        """
        x = patchify(images, self.shape.patch)
        table = self._table(x)
        special, parts = self.shape.special, layout.parts("tokens")
        if parts == 1:
            x = jnp.pad(self.patch(x), ((0, 0), (special, 0), (0, 0)))
        else:
            # Pixels take the tokens' places before they are embedded: to split them is then to leave some out.
            padding = context.padded_length(self.shape.tokens, parts) - self.shape.tokens
            x = layout.placed(jnp.pad(x, ((0, 0), (special, padding), (0, 0))), "batch", "tokens", None)
            x = jnp.where(_between(special, self.shape.tokens, x)[:, None], self.patch(x), 0)
            table = layout.placed(jnp.pad(table, ((0, padding), (0, 0))), "tokens", None)
        return x + layout.broadcast(table, x.shape, layout.of(x))

    def _table(self, x: jax.Array) -> jax.Array:
        """What tokens have beside their pixels: [N, D]. x: any array that is split by examples, in the right dtype."""
        split, dtype = layout.of(x), x.dtype
        if self.position is not None:
            position = ready(self.position, dtype, split)
        else:
            position = layout.gathered(jnp.asarray(sincos2d(*self.shape.grid, self.shape.width), dtype), split)
        own = position.shape[0] - self.shape.patches  # 1 when the class token has a learned position
        lead = []
        if self.cls is not None:
            cls = ready(self.cls, dtype, split)[None]
            lead.append(cls + position[:1] if own else cls)
        if self.registers is not None:
            lead.append(ready(self.registers, dtype, split))
        return jnp.concatenate([*lead, position[own:]])

    def pooled(self, x: jax.Array) -> jax.Array:
        """Tokens [B, N, D] -> what the head sees of them [B, D]."""
        # Registers have done their work when the patches are pooled (Darcet et al. 2024).
        start, stop = (0, 1) if self.cls is not None else (self.shape.special, self.shape.tokens)
        seen = None
        if layout.parts("tokens") == 1:
            x = x[:, start:stop]
        else:
            seen = _between(start, stop, x)
        if self.pool is not None:
            return self.pool(x, seen)
        if seen is not None:
            x = jnp.where(seen[:, None], x, 0)
        return (jnp.sum(x, axis=1, dtype=jnp.float32) / (stop - start)).astype(x.dtype)

    def encode(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """All blocks: [B, N, D] -> [B, N, D]."""
        depth = self.shape.depth
        first = 0 if self.model.drop_path_schedule == "linear" else self.model.drop_path
        rates = jnp.linspace(first, self.model.drop_path, depth) if self.model.drop_path else None
        keys = None if key is None or not self._is_random() else jax.random.split(key, depth)

        def run(x: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
            (graph, own), rate, key = inputs
            return nnx.merge(graph, own)(x, rate, key), None

        if self.model.remat != "none":
            saved = jax.checkpoint_policies.save_only_these_names(*SAVED if self.model.remat == "names" else ())
            # A loop keeps the compiler from taking the second computation for the first; unrolled, it must be told.
            run = jax.checkpoint(run, policy=saved, prevent_cse=not self.model.scan)
        if self.model.scan:
            return jax.lax.scan(run, x, (nnx.split(self.blocks), rates, keys))[0]
        assert isinstance(self.blocks, nnx.List)
        for number, block in enumerate(self.blocks):
            rate, key = (None if each is None else each[number] for each in (rates, keys))
            x, _ = run(x, (nnx.split(block), rate, key))
        return x

    def _is_random(self) -> bool:
        model = self.model
        return any((model.dropout, model.projection_dropout, model.attention_dropout, model.drop_path))


def _between(start: int, stop: int, x: jax.Array) -> jax.Array:
    """Which tokens of x [B, N, D] are those from `start` to `stop`: bool [N], split as they are."""
    number = jax.lax.broadcasted_iota(jnp.int32, (x.shape[1],), 0, out_sharding=layout.spec("tokens"))
    return (start <= number) & (number < stop)


def patchify(images: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """[B, H, W, C] -> [B, patches, pixels]: patches row by row, and within one (row, column, channel)."""
    batch, rows, columns = images.shape[0], images.shape[1] // patch[0], images.shape[2] // patch[1]
    cut = (batch, rows, patch[0], columns, patch[1], images.shape[3])
    x = jax.lax.reshape(images, cut, out_sharding=layout.spec("batch", *(None,) * 5))
    x = x.transpose(0, 1, 3, 2, 4, 5)
    pixels = patch[0] * patch[1] * images.shape[3]
    return jax.lax.reshape(x, (batch, rows * columns, pixels), out_sharding=layout.spec("batch", None, None))


def parameter_count(model: nnx.Module) -> int:
    """How many numbers the model learns."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
