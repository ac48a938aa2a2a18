"""Losses and top-k correctness, one number an example.

Nothing here takes a mean over the batch: the caller does, over the examples that count. All of it is arithmetic along
the class axis, which is whole on every device, so a batch split over a mesh needs no communication. Everything is
computed in float32 whatever the logits come in.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def softmax(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy -sum_c t_c log softmax(x)_c. logits, targets [B, C]; returns [B], float32."""
    return optax.losses.softmax_cross_entropy(logits.astype(jnp.float32), targets.astype(jnp.float32))


def sigmoid(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross-entropy of each class by itself, summed over the classes. logits, targets [B, C]; [B], float32.

    The sum is that of Steiner et al. 2021 (AugReg, arXiv:2106.10270), on ImageNet-21k; DeiT-III (Touvron et al. 2022,
    arXiv:2204.07118) takes the mean over C classes, which is this over C. Begin with `model.head_bias` well below 0.
    """
    each = optax.losses.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets.astype(jnp.float32))
    return each.sum(axis=-1)


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"softmax": softmax, "sigmoid": sigmoid}


def one_hot(labels: jax.Array, classes: int) -> jax.Array:
    """labels [B], integers -> [B, C] float32; a label outside 0..C-1, such as a padded example's -1, gives zeros."""
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32)


def smooth(targets: jax.Array, amount: float) -> jax.Array:
    """(1 - a) * targets + a / C, for either loss (Szegedy et al. 2016, arXiv:1512.00567). targets [B, C]."""
    return optax.losses.smooth_labels(targets, amount) if amount else targets


def binarize(targets: jax.Array) -> jax.Array:
    """1 for every class that has a share of the target, however small, and 0 for the others. targets [B, C]; float32.

    So a mixed image is of both its classes (Wightman et al. 2021, arXiv:2110.00476; DeiT-III).
    """
    return (targets > 0).astype(jnp.float32)


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the label is among the k largest logits. logits [B, C], labels [B]; returns [B], bool.

    Of equal logits the lower class comes first, so exactly one class has each rank; with k >= C every label is
    correct. A row that holds a NaN is wrong, and so is a label outside 0..C-1.
    """
    logits = logits.astype(jnp.float32)
    classes = jnp.arange(logits.shape[-1])
    mine = labels[:, None] == classes
    own = jnp.where(mine, logits, 0.0).sum(axis=-1, keepdims=True)
    ahead = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    return (ahead.sum(axis=-1) < k) & mine.any(axis=-1) & ~jnp.isnan(logits).any(axis=-1)
