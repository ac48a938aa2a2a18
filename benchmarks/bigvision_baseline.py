"""A Vision Transformer trainer in the manner of big_vision (google-research/big_vision), for `step.py`.

Written anew after its structure, as of late 2026: Linen modules with logical constraints on the activations, LayerNorm
in float32 that leaves float32, a Python loop over blocks, a float32 head, one-hot targets; a jitted update over a mesh
of one axis with the state donated; an optax chain of clipping, moments, rate, weight decay, schedule and sign; the
norms of gradients, parameters and updates in every step. The intermediate values that its model returns besides the
logits are left out, since its step does not use them and XLA drops them.

Where the model of the comparison needs more than big_vision has, it is as ours: dropout of the attention weights, an
attention without biases, the exact GELU, a position of the class token, float32 for all parameters.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from linen_baseline import Sizes, Trainer, Update, is_kernel

from vit_dist.model.position import sincos2d

ACTIVATIONS = ("act_batch", "act_len", "act_emb")  # the logical names of [B, N, D]


class MlpBlock(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        sizes = self.sizes
        inits: dict[str, Any] = {
            "kernel_init": nn.initializers.xavier_uniform(),
            "bias_init": nn.initializers.normal(1e-6),
        }
        x = nn.Dense(sizes.hidden, dtype=sizes.dtype, **inits)(x)
        x = nn.with_logical_constraint(x, ACTIVATIONS)
        x = nn.gelu(x, approximate=sizes.tanh_gelu)
        x = nn.Dropout(sizes.dropout)(x, deterministic)
        return nn.Dense(sizes.width, dtype=sizes.dtype, **inits)(x)


class EncoderBlock(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        sizes = self.sizes
        x = nn.with_logical_constraint(x, ACTIVATIONS)
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=sizes.heads,
            kernel_init=nn.initializers.xavier_uniform(),
            use_bias=sizes.attention_bias,
            dropout_rate=sizes.attention_dropout,
            broadcast_dropout=False,
            deterministic=deterministic,
            dtype=sizes.dtype,
        )(y, y)
        y = nn.with_logical_constraint(y, ACTIVATIONS)
        x = x + nn.Dropout(sizes.projection_dropout)(y, deterministic)
        y = MlpBlock(sizes)(nn.LayerNorm()(x), deterministic)
        y = nn.with_logical_constraint(y, ACTIVATIONS)
        x = x + nn.Dropout(sizes.dropout)(y, deterministic)
        return nn.with_logical_constraint(x, ACTIVATIONS)


class Encoder(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        for number in range(self.sizes.depth):
            x = EncoderBlock(self.sizes, name=f"encoderblock_{number}")(x, deterministic)
        return nn.LayerNorm(name="encoder_norm")(x)


class ViT(nn.Module):
    """Images [B, H, W, C] -> logits [B, classes], float32."""

    sizes: Sizes

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        sizes = self.sizes
        images = jnp.asarray(images, sizes.dtype)
        embedding = nn.Conv(
            sizes.width, sizes.patch, strides=sizes.patch, padding="VALID", name="embedding", dtype=sizes.dtype
        )
        x = embedding(images)
        count, rows, columns, width = x.shape
        x = x.reshape(count, rows * columns, width)
        cls_positions = int(sizes.pool == "cls" and sizes.cls_position and sizes.position == "learned")
        if sizes.position == "learned":
            shape = (1, cls_positions + rows * columns, width)
            positions = self.param("pos_embedding", nn.initializers.normal(1 / np.sqrt(width)), shape).astype(x.dtype)
        else:
            positions = sincos2d(rows, columns, width)[None].astype(x.dtype)
        x = x + positions[:, cls_positions:]
        if sizes.pool == "cls":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, width)).astype(x.dtype)
            cls = cls + positions[:, :1] if cls_positions else cls
            x = jnp.concatenate([jnp.tile(cls, [count, 1, 1]), x], axis=1)
        x = nn.Dropout(sizes.embedding_dropout)(x, not train)
        x = Encoder(sizes, name="Transformer")(x, not train)
        x = x[:, 0] if sizes.pool == "cls" else jnp.mean(x, axis=1)
        kernel = nn.initializers.zeros if sizes.head_zero_init else nn.initializers.lecun_normal()
        return nn.Dense(sizes.classes, name="head", kernel_init=kernel)(x)


class TrainState(struct.PyTreeNode):
    params: Any
    opt: Any


def make_optimizer(update: Update) -> optax.GradientTransformation:
    """Returns the chain; weight decay is multiplied by the schedule, but not by the rate."""
    return optax.chain(
        optax.identity() if update.clip is None else optax.clip_by_global_norm(update.clip),
        optax.scale_by_adam(update.b1, update.b2, update.eps, mu_dtype=update.moment_dtype)
        if update.adam
        else optax.identity(),
        optax.scale(update.rate),
        *([optax.add_decayed_weights(update.rate * update.decay, is_kernel)] if update.decay else []),
        optax.scale_by_schedule(optax.constant_schedule(1.0)),
        optax.scale(-1.0),
    )


def make_trainer(sizes: Sizes, update: Update, images: np.ndarray, labels: np.ndarray) -> Trainer:
    """Returns the trainer; images are float32 [B, H, W, C], normalised, and labels int32 [B]."""
    model, optimizer = ViT(sizes), make_optimizer(update)

    def create(key: jax.Array, images: jax.Array) -> TrainState:
        params = model.init(key, images, train=False)["params"]
        return TrainState(params, optimizer.init(params))

    def step(
        state: TrainState, images: jax.Array, targets: jax.Array, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        _, dropout_key = jax.random.split(jax.random.fold_in(key, state.opt[-2].count))  # the schedule's

        def loss_of(params: Any) -> jax.Array:
            logits: Any = model.apply({"params": params}, images, train=True, rngs={"dropout": dropout_key})
            return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        updates, opt = optimizer.update(gradients, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        norms = {"l2_grads": gradients, "l2_params": params, "l2_updates": updates}
        return TrainState(params, opt), {"loss": loss, **{name: _norm(tree) for name, tree in norms.items()}}

    targets = np.eye(sizes.classes, dtype=np.float32)[labels]
    return Trainer("big_vision", create, step, images, targets, _logical_rules)


def _norm(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(tree)))


@contextlib.contextmanager
def _logical_rules(mesh: Mesh) -> Iterator[None]:
    with jax.set_mesh(mesh), nn.logical_axis_rules([("act_batch", "data")]):
        yield
