"""Where a model looks: its attention weights, and maps of them over the image.

The fused kernels of training do not return weights, so this is a forward pass of its own, which computes each block's
weights by plain products beside the block. Registers and the class token take part in it, but no map shows them.
"""

import jax
import jax.numpy as jnp

from vit_dist.config import ConfigError
from vit_dist.mesh import layout
from vit_dist.model.block import each_block
from vit_dist.model.vit import ViT

Maps = dict[str, jax.Array]


def attention_weights(model: ViT, images: jax.Array) -> jax.Array:
    """Returns the attention weights of all blocks, [B, blocks, H, N, N], float32, of normalised images [B, H, W, C].

    Row q of a matrix sums to 1, and says how much token q takes of each. The N tokens are the class token, registers,
    then the patches row by row, of which a model may have none of the first two.

    Raises:
      ConfigError: the mesh splits tokens.
    """
    return jnp.stack(_each_weights(model, images), axis=1)


def attention_maps(model: ViT, images: jax.Array) -> Maps:
    """Returns maps over the patches, [B, rows, columns], float32, each of which sums to what falls on the patches.

    "rollout" (Abnar and Zuidema 2020, arXiv:2005.00928) follows attention through all blocks: the product of their
    matrices, each the mean over heads, and the mean of that and the identity, which stands for the residual path.
    "last" is the last block's, the mean over heads. Both are the row of the class token where the model pools it
    (`pool=cls`, `cls_mean`), and otherwise the mean of the rows of the patches.
    """
    special, rollout, last = model.shape.special, None, None
    for weights in _each_weights(model, images):
        last = jnp.mean(weights, axis=1)
        step = (last + jnp.eye(model.shape.tokens)) / 2
        rollout = step if rollout is None else jnp.einsum("bqk,bkn->bqn", step, rollout)
    assert rollout is not None and last is not None

    def over_image(matrix: jax.Array) -> jax.Array:
        rows = matrix[:, :1] if model.model.pool in ("cls", "cls_mean") else matrix[:, special:]
        patches = jnp.mean(rows, axis=1)[:, special:]
        grid = (len(images), *model.shape.grid)
        return jax.lax.reshape(patches, grid, out_sharding=layout.spec("batch", None, None))

    return {"rollout": over_image(rollout), "last": over_image(last)}


def _each_weights(model: ViT, images: jax.Array) -> list[jax.Array]:
    """Returns the weights [B, H, N, N] of each block."""
    if layout.shard_count("tokens") > 1:
        raise ConfigError("mesh.context: attention maps need all tokens on a device; set mesh.context=1")
    x, rotation, weights = *model.embedded(images), []
    for block in each_block(model.blocks):
        weights.append(block.attention.weights(block.norm1.normalise(x), block.norm1, rotation))
        x = block(x, rotation=rotation)
    return weights
