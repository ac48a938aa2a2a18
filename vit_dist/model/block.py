"""A block of the Vision Transformer, and how a row of blocks is run: as a loop or unrolled, with or without `remat`."""

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vit_dist import config
from vit_dist.mesh import layout
from vit_dist.model.attention import Attention
from vit_dist.model.layers import INITIALIZERS, Mlp, drop_path, split_key
from vit_dist.model.norm import Norm, Scale
from vit_dist.model.position import Rotation
from vit_dist.model.shape import Shape

SAVED = ("qkv", "attention", "mlp", "residual")  # kept by remat="names", which runs no dense product twice


class Block(nnx.Module):
    """Adds attention(norm(x)) to x, then mlp(norm(x)); with `parallel`, both at once on the same norm (ViT-22B)."""

    def __init__(self, model: config.Model, shape: Shape, rngs: nnx.Rngs):
        common: dict[str, Any] = {"rngs": rngs, "initializer": INITIALIZERS[model.kernel_init]}
        self.parallel = shape.parallel
        self.norm1 = Norm(model, shape.width, "width", rngs=rngs)
        self.attention = Attention(model, shape, rngs)
        self.norm2 = None if shape.parallel else Norm(model, shape.width, "width", rngs=rngs)
        self.mlp = Mlp(shape.width, shape.mlp, activation=shape.activation, dropout=model.dropout, **common)
        scale = model.layer_scale
        self.scale1 = Scale(shape.width, scale, rngs=rngs) if scale is not None else None
        self.scale2 = Scale(shape.width, scale, rngs=rngs) if scale is not None else None

    def __call__(
        self,
        x: jax.Array,
        path_rate: jax.Array | None = None,
        key: jax.Array | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """Maps x [B, N, D] to [B, N, D].

        Args:
          x: the tokens.
          path_rate: the probability with which an example skips a branch; None never skips.
          key: the randomness; None draws nothing.
          rotation: of queries and keys, with `position=rope2d`.
        """
        keys = split_key(key, 4)
        norm = self.norm1
        h = norm.normalise(x)
        attended = self.attention(h, keys[0], norm, self.scale1, rotation)
        x = add(x, drop_path(attended, path_rate, keys[1]))
        if self.norm2 is not None:
            x, norm = checkpoint_name(x, "residual"), self.norm2
            h = norm.normalise(x)
        return add(x, drop_path(self.mlp(h, keys[2], norm, self.scale2), path_rate, keys[3]))


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """Adds a branch y [B, N, D] to x [B, N, D].

    The sum is of matrices [B N, D], as the dense product that made y is. If x is used again as it stands, XLA's GPU
    compiler then lets the product add it without a copy.
    """
    split = layout.spec_of(x)
    if layout.shard_count("tokens") > 1:
        return x + y
    return jax.lax.reshape(layout.joined(x, 0, 2) + layout.joined(y, 0, 2), x.shape, out_sharding=split)


def run_blocks(
    blocks: nnx.Module,
    x: jax.Array,
    rates: jax.Array | None,
    keys: jax.Array | None,
    rotation: Rotation | None,
    model: config.Model,
) -> jax.Array:
    """Applies all blocks to x [B, N, D].

    Args:
      blocks: a `Block` whose parameters are stacked (`model.scan`), or an `nnx.List` of blocks.
      x: the tokens.
      rates: drop-path rates [depth]; None: none.
      keys: a key for each block; None draws nothing.
      rotation: as for a block.
      model: `scan` and `remat`.
    """

    def run(x: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
        (graph, parameters), rate, key = inputs
        return nnx.merge(graph, parameters)(x, rate, key, rotation), None

    if model.remat != "none":
        # XLA must not merge the second computation with the first; a loop prevents that, unrolled code does not.
        run = jax.checkpoint(run, policy=_is_kept if model.remat == "names" else None, prevent_cse=not model.scan)
    if model.scan:
        return jax.lax.scan(run, x, (nnx.split(blocks), rates, keys))[0]
    assert isinstance(blocks, nnx.List)
    for number, block in enumerate(blocks):
        rate, key = (None if values is None else values[number] for values in (rates, keys))
        x, _ = run(x, (nnx.split(block), rate, key))
    return x


def first_blocks(blocks: nnx.Module, count: int) -> nnx.Module:
    """Returns the first so many of the blocks, which are stacked or an `nnx.List`."""
    if isinstance(blocks, nnx.List):
        return nnx.List(list(blocks)[:count])
    graph, parameters = nnx.split(blocks)
    return nnx.merge(graph, jax.tree.map(lambda stack: stack[:count], parameters))


def each_block(blocks: nnx.Module) -> Iterator[Block]:
    """Yields the blocks one by one; they are stacked or an `nnx.List`."""
    if isinstance(blocks, nnx.List):
        parts = [nnx.split(block) for block in blocks]
    else:
        graph, stacks = nnx.split(blocks)
        depth = len(jax.tree.leaves(stacks)[0])
        parts = [(graph, jax.tree.map(lambda stack, i=i: stack[i], stacks)) for i in range(depth)]
    for graph, parameters in parts:
        block = nnx.merge(graph, parameters)
        assert isinstance(block, Block)
        yield block


def _is_kept(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """Returns whether remat="names" keeps an operation's results: those of a name in `SAVED`, and cuDNN's attention."""
    named = jax.checkpoint_policies.save_only_these_names(*SAVED)
    # cuDNN's kernel returns a second array for its derivative, which has no name.
    return named(primitive, *arguments, **parameters) or primitive.name == "dot_product_attention_fwd_wrapper"
