"""The Vision Transformer of the d2l.ai lesson (section 11.8) in Flax Linen, written from the lesson's text alone.

It shares no code with vit_dist and is trained the plainest way: SGD on one device.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

SIDE, PATCH, WIDTH, HEADS, HIDDEN, BLOCKS, CLASSES = 96, 16, 512, 8, 2048, 2, 10


class Attention(nn.Module):
    """Four linear maps without biases; dropout on the weights."""

    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        def in_heads(name: str) -> jax.Array:
            y = nn.Dense(WIDTH, use_bias=False, name=name)(x)
            return y.reshape(*y.shape[:2], HEADS, -1).swapaxes(1, 2)

        queries, keys, values = in_heads("queries"), in_heads("keys"), in_heads("values")
        weights = nn.softmax(queries @ keys.swapaxes(2, 3) / math.sqrt(WIDTH / HEADS))
        mixed = nn.Dropout(self.dropout, deterministic=not training)(weights) @ values
        return nn.Dense(WIDTH, use_bias=False, name="out")(mixed.swapaxes(1, 2).reshape(x.shape))


class Block(nn.Module):
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        x = x + Attention(self.dropout, name="attention")(nn.LayerNorm(name="norm1")(x), training)
        y = nn.gelu(nn.Dense(HIDDEN, name="up")(nn.LayerNorm(name="norm2")(x)))
        y = nn.Dense(WIDTH, name="down")(nn.Dropout(self.dropout, deterministic=not training)(y))
        return x + nn.Dropout(self.dropout, deterministic=not training)(y)


class ViT(nn.Module):
    """[B, 96, 96, 1] -> [B, 10]."""

    dropout: float

    @nn.compact
    def __call__(self, images: jax.Array, training: bool) -> jax.Array:
        x = nn.Conv(WIDTH, (PATCH, PATCH), strides=(PATCH, PATCH), name="patch")(images)
        x = x.reshape(len(x), -1, WIDTH)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(0.01), (1, x.shape[1], WIDTH))
        x = nn.Dropout(self.dropout, deterministic=not training)(x)
        for number in range(BLOCKS):
            x = Block(self.dropout, name=f"block{number}")(x, training)
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm(name="norm")(x[:, 0]))


def train(model: ViT, parameters: Any, rate: float, batches: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """The loss of each step of SGD on images in [0, 1] and labels."""

    @jax.jit
    def step(parameters: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
        def loss_of(parameters: Any) -> jax.Array:
            logits = model.apply({"params": parameters}, images, True, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradient = jax.value_and_grad(loss_of)(parameters)
        return jax.tree.map(lambda p, g: p - rate * g, parameters, gradient), loss

    losses = []
    for number, (images, labels) in enumerate(batches):
        parameters, loss = step(parameters, images, labels, jax.random.key(number))
        losses.append(float(loss))
    return losses


def as_ours(parameters: Any) -> Any:
    """The lesson's parameters under vit_dist's names."""

    def block(own: Any) -> Any:
        attention = own["attention"]
        parts = [attention[name]["kernel"].reshape(WIDTH, HEADS, -1) for name in ("queries", "keys", "values")]
        return {
            "norm1": own["norm1"],
            "attention": {
                "qkv": {"kernel": np.stack(parts, axis=1)},
                "projection": {"kernel": attention["out"]["kernel"].reshape(HEADS, -1, WIDTH)},
            },
            "norm2": own["norm2"],
            "mlp": {"up": own["up"], "down": own["down"]},
        }

    patch = parameters["patch"]
    return {
        "patch": {"kernel": patch["kernel"].reshape(-1, WIDTH), "bias": patch["bias"]},
        "cls": parameters["cls"][0, 0],
        "position": parameters["position"][0],
        "blocks": {number: block(parameters[f"block{number}"]) for number in range(BLOCKS)},
        "norm": parameters["norm"],
        "head": parameters["head"],
    }
