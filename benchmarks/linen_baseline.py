"""A Vision Transformer trainer in Flax Linen, written in the usual way, that `step.py` compares with.

It uses `flax.training`'s TrainState and a jitted step over a mesh of automatic axes, splits the batch over `data`,
replicates the parameters, and leaves the rest to XLA. It imports nothing of vit_dist. The model's equations and
parameters are the same: pre-norm blocks, GELU, learned positions, a `<cls>` token, a linear head.
"""

import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


class Mlp(nn.Module):
    hidden: int
    dropout: float
    tanh_gelu: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        width = x.shape[-1]
        x = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype)(x), approximate=self.tanh_gelu)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.Dense(width, dtype=self.dtype)(x)
        return nn.Dropout(self.dropout, deterministic=not train)(x)


class Block(nn.Module):
    heads: int
    hidden: int
    dropout: float
    attention_dropout: float
    attention_bias: bool
    tanh_gelu: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=self.heads,
            dtype=self.dtype,
            use_bias=self.attention_bias,
            dropout_rate=self.attention_dropout,
            broadcast_dropout=False,
            deterministic=not train,
        )(y)
        x = x + y
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return x + Mlp(self.hidden, self.dropout, self.tanh_gelu, self.dtype)(y, train=train)


class ViT(nn.Module):
    """Images [B, H, W, C] -> logits [B, classes], float32."""

    width: int
    depth: int
    hidden: int
    heads: int
    patch: tuple[int, int]
    classes: int
    dropout: float  # in the MLP
    embedding_dropout: float
    attention_dropout: float
    attention_bias: bool
    tanh_gelu: bool
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Conv(self.width, self.patch, strides=self.patch, padding="VALID", dtype=self.dtype)(images)
        x = x.reshape(x.shape[0], -1, self.width)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, self.width)).astype(x.dtype), x], axis=1)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        x = nn.Dropout(self.embedding_dropout, deterministic=not train)(x + positions.astype(x.dtype))
        for _ in range(self.depth):
            x = Block(
                self.heads,
                self.hidden,
                self.dropout,
                self.attention_dropout,
                self.attention_bias,
                self.tanh_gelu,
                self.dtype,
            )(x, train=train)
        x = nn.LayerNorm(dtype=self.dtype)(x)[:, 0]
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


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


class Trainer:
    """Trains repeatedly on a single batch, which stays on the devices."""

    name = "flax linen"

    def __init__(self, model: ViT, optimizer: optax.GradientTransformation, images: np.ndarray, labels: np.ndarray):
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

        def create(key: jax.Array) -> train_state.TrainState:
            params = model.init(key, jnp.zeros((1, *images.shape[1:]), model.dtype), train=False)["params"]
            return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

        self.state = jax.jit(create, out_shardings=replicated)(jax.random.key(0))
        self._batch = (jax.device_put(images, split), jax.device_put(labels, split))
        self._key = jax.device_put(jax.random.key(1), replicated)
        self._step = jax.jit(train_step, out_shardings=(replicated, replicated), donate_argnums=0)
        self.metrics: dict[str, jax.Array] = {}

    def in_use(self) -> contextlib.AbstractContextManager:
        """Returns the context in which to call the steps."""
        return contextlib.nullcontext()

    def step(self) -> None:
        """Dispatches one step."""
        self.state, self.metrics = self._step(self.state, *self._batch, self._key)

    def block(self) -> float:
        """Waits for all steps; returns the loss of the last."""
        return float(jax.block_until_ready((self.state, self.metrics))[1]["loss"])

    def parameters(self) -> int:
        """Returns the number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
