"""A Vision Transformer trainer in Flax Linen, written in the usual way, that `step.py` compares with.

It uses `flax.training`'s TrainState and a jitted step over a mesh of automatic axes, splits the batch over `data`,
replicates the parameters, and leaves the rest to XLA. The model's equations and parameters are those of ours: pre-norm
blocks, GELU, one head on the class token or on the mean of the tokens. Of vit_dist it imports the table of fixed
positions only. `Sizes` and `Trainer` serve `bigvision_baseline.py` too.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_dist.model.position import sincos2d


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a baseline must know to be the same model as ours."""

    width: int
    depth: int
    hidden: int
    heads: int
    patch: tuple[int, int]
    classes: int
    pool: str  # "cls" or "mean"
    position: str  # "learned" or "sincos2d"
    cls_position: bool  # the class token has a learned position too
    dropout: float  # after each of the MLP's two layers
    projection_dropout: float  # after the attention's projection
    embedding_dropout: float
    attention_dropout: float
    attention_bias: bool  # of queries, keys, values and projection
    tanh_gelu: bool
    head_zero_init: bool
    dtype: Any  # of the arithmetic; parameters are float32


@dataclasses.dataclass(frozen=True)
class Update:
    """SGD or AdamW at a constant rate, its weight decay on kernels alone."""

    adam: bool
    rate: float
    decay: float
    b1: float
    b2: float
    eps: float
    moment_dtype: str  # of the first moment
    clip: float | None  # largest norm of the gradient


def is_kernel(params: Any) -> Any:
    """Returns the tree with each array replaced by a bool: whether weight decay applies to it."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


class Mlp(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        sizes = self.sizes
        x = nn.gelu(nn.Dense(sizes.hidden, dtype=sizes.dtype)(x), approximate=sizes.tanh_gelu)
        x = nn.Dropout(sizes.dropout, deterministic=not train)(x)
        x = nn.Dense(sizes.width, dtype=sizes.dtype)(x)
        return nn.Dropout(sizes.dropout, deterministic=not train)(x)


class Block(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        sizes = self.sizes
        y = nn.LayerNorm(dtype=sizes.dtype)(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=sizes.heads,
            dtype=sizes.dtype,
            use_bias=sizes.attention_bias,
            dropout_rate=sizes.attention_dropout,
            broadcast_dropout=False,
            deterministic=not train,
        )(y)
        x = x + nn.Dropout(sizes.projection_dropout, deterministic=not train)(y)
        y = nn.LayerNorm(dtype=sizes.dtype)(x)
        return x + Mlp(sizes)(y, train=train)


class ViT(nn.Module):
    """Images [B, H, W, C] -> logits [B, classes], float32."""

    sizes: Sizes

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        sizes = self.sizes
        x = nn.Conv(sizes.width, sizes.patch, strides=sizes.patch, padding="VALID", dtype=sizes.dtype)(images)
        count, rows, columns, _ = x.shape
        x = x.reshape(count, rows * columns, sizes.width)
        if sizes.pool == "cls":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, sizes.width))
            x = jnp.concatenate([jnp.broadcast_to(cls, (count, 1, sizes.width)).astype(x.dtype), x], axis=1)
        if sizes.position == "learned":
            without = sizes.pool == "cls" and not sizes.cls_position
            shape = (1, x.shape[1] - without, sizes.width)
            positions = self.param("positions", nn.initializers.normal(0.02), shape)
        else:
            without, positions = sizes.pool == "cls", sincos2d(rows, columns, sizes.width)[None]
        positions = jnp.pad(positions, ((0, 0), (int(without), 0), (0, 0)))
        x = nn.Dropout(sizes.embedding_dropout, deterministic=not train)(x + positions.astype(x.dtype))
        for _ in range(sizes.depth):
            x = Block(sizes)(x, train=train)
        x = nn.LayerNorm(dtype=sizes.dtype)(x)
        x = x[:, 0] if sizes.pool == "cls" else x.mean(axis=1)
        kernel = nn.initializers.zeros if sizes.head_zero_init else nn.initializers.lecun_normal()
        return nn.Dense(sizes.classes, kernel_init=kernel, dtype=sizes.dtype)(x).astype(jnp.float32)


class Trainer:
    """Trains repeatedly on a single batch, which stays on the devices.

    Args:
      name: of this side of the comparison.
      create: `create(key, images)` returns the state, which has `params`; the images are zeros [1, H, W, C].
      step: `step(state, images, labels, key)` returns the new state and the metrics, `loss` among them.
      images: float32 [B, H, W, C], normalised.
      labels: int32 [B], or whatever the step takes, split by its first dimension.
      context: `context(mesh)` is what the step is traced and called in.
    """

    def __init__(
        self,
        name: str,
        create: Callable,
        step: Callable,
        images: np.ndarray,
        labels: np.ndarray,
        context: Callable = lambda mesh: contextlib.nullcontext(),
    ):
        self.name = name
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        self._context = lambda: context(mesh)
        self._batch = (jax.device_put(images, split), jax.device_put(labels, split))
        with self.in_use():
            example = jnp.zeros((1, *images.shape[1:]))
            self.state = jax.jit(create, out_shardings=replicated)(jax.random.key(0), example)
        self._key = jax.device_put(jax.random.key(1), replicated)
        self._step = jax.jit(step, out_shardings=(replicated, replicated), donate_argnums=0)
        self.metrics: dict[str, jax.Array] = {}

    def in_use(self) -> contextlib.AbstractContextManager:
        """Returns the context in which to call the steps."""
        return self._context()

    def compile(self) -> jax.stages.Compiled:
        """Compiles the step, which the first call then reuses."""
        with self.in_use():
            return self._step.lower(self.state, *self._batch, self._key).compile()

    def step(self) -> None:
        """Dispatches one step."""
        self.state, self.metrics = self._step(self.state, *self._batch, self._key)

    def block(self) -> float:
        """Waits for all steps; returns the loss of the last."""
        return float(jax.block_until_ready((self.state, self.metrics))[1]["loss"])

    def parameters(self) -> int:
        """Returns the number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))


def train_step(
    state: train_state.TrainState, images: jax.Array, labels: jax.Array, key: jax.Array
) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
    """Updates the state on images [B, H, W, C], float, and labels [B]; also returns the mean loss and accuracy."""

    def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
        dropout_key = jax.random.fold_in(key, state.step)
        logits = state.apply_fn({"params": params}, images, train=True, rngs={"dropout": dropout_key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    (loss, logits), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    metrics = {"loss": loss, "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels)}
    return state.apply_gradients(grads=gradients), metrics


def make_trainer(sizes: Sizes, update: Update, images: np.ndarray, labels: np.ndarray) -> Trainer:
    """Returns the trainer; images are float32 [B, H, W, C], normalised, and labels int32 [B]."""
    model = ViT(sizes)
    optimizer = optax.sgd(update.rate)
    if update.adam:
        moments: dict[str, Any] = {"b1": update.b1, "b2": update.b2, "eps": update.eps, "mu_dtype": update.moment_dtype}
        optimizer = optax.adamw(update.rate, **moments, weight_decay=update.decay, mask=is_kernel)
    if update.clip is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(update.clip), optimizer)

    def create(key: jax.Array, images: jax.Array) -> train_state.TrainState:
        params = model.init(key, images, train=False)["params"]
        return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

    return Trainer("flax linen", create, train_step, images, labels)
