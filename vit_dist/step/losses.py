"""Losses and top-k correctness, with one value for each example.

No function takes a mean over the batch: the caller does, over the examples that count. The class axis is never split,
so these functions need no communication on a mesh. The arithmetic is in float32 for logits of any dtype.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def softmax(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the cross-entropy -sum_c t_c log softmax(x)_c, float32 [B], of logits x and targets t, both [B, C]."""
    return optax.losses.softmax_cross_entropy(logits.astype(jnp.float32), targets.astype(jnp.float32))


def sigmoid(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the binary cross-entropy summed over classes, float32 [B], of logits and targets, both [B, C].

    The sum is that of Steiner et al. 2021 (AugReg, arXiv:2106.10270), on ImageNet-21k; DeiT-III (Touvron et al. 2022,
    arXiv:2204.07118) takes the mean, which is the sum divided by C. Start with `model.head_bias` well below 0.
    """
    per_class = optax.losses.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets.astype(jnp.float32))
    return per_class.sum(axis=-1)


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"softmax": softmax, "sigmoid": sigmoid}


def one_hot(labels: jax.Array, classes: int) -> jax.Array:
    """Returns one-hot targets, float32 [B, C], of integer labels [B].

    A label outside 0..C-1, such as the -1 of padding, gives zeros.
    """
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32)


def smooth(targets: jax.Array, amount: float) -> jax.Array:
    """Returns (1 - a) * targets + a / C for targets [B, C] and amount a (Szegedy et al. 2016, arXiv:1512.00567)."""
    return optax.losses.smooth_labels(targets, amount) if amount else targets


def binarize(targets: jax.Array) -> jax.Array:
    """Returns 1 for every class whose target is above 0, and 0 for the others: [B, C], float32.

    A mixed image then fully belongs to both of its classes (Wightman et al. 2021, arXiv:2110.00476; DeiT-III).
    """
    return (targets > 0).astype(jnp.float32)


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Returns whether the label is among the k largest logits, bool [B], of logits [B, C] and labels [B].

    Of equal logits the lower class ranks first, so no two classes share a rank; with k >= C every label is correct.
    A row that holds a NaN is incorrect, and so is a label outside 0..C-1.
    """
    logits = logits.astype(jnp.float32)
    classes = jnp.arange(logits.shape[-1])
    is_label = labels[:, None] == classes
    label_logit = jnp.where(is_label, logits, 0.0).sum(axis=-1, keepdims=True)
    ahead = (logits > label_logit) | ((logits == label_logit) & (classes < labels[:, None]))
    return (ahead.sum(axis=-1) < k) & is_label.any(axis=-1) & ~jnp.isnan(logits).any(axis=-1)
