"""One step of an evaluation, as a pure function to compile, and what the model is given without augmentation.

The sums over all batches stay on the devices until the last, so that nothing waits for the host.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vit_dist import config
from vit_dist.config import pair
from vit_dist.data.pictures import crop
from vit_dist.mesh.feed import Batch
from vit_dist.step import augment, losses
from vit_dist.step.state import ModelFunction, Parameters


def make_evaluation_step(
    settings: config.Config, model: ModelFunction, *, augment_on_device: bool
) -> Callable[[Parameters, Batch, dict[str, jax.Array]], dict[str, jax.Array]]:
    """`step(parameters, batch, totals) -> totals` with the batch's sums added; rows of a False `mask` count nothing.

    Totals: `loss` float32; `count`, `top1`, `top5` int32; `class_count`, `class_top1` int32 [classes].
    """
    data, classes = settings.data, model.settings.num_classes
    assert classes is not None
    per_example = losses.LOSSES[settings.loss]

    def step(parameters: Parameters, batch: Batch, totals: dict[str, jax.Array]) -> dict[str, jax.Array]:
        images = model_input(batch["image"], data, model.settings, augment_on_device=augment_on_device)
        logits = model(parameters, images)
        labels, mask = batch["label"], batch["mask"]
        targets = losses.one_hot(labels, classes)
        loss = jnp.where(mask, per_example(logits, targets), 0)
        top1 = losses.top_k_correct(logits, labels, 1) & mask
        top5 = losses.top_k_correct(logits, labels, 5) & mask
        per_class = targets.astype(jnp.int32)
        sums = {
            "loss": jnp.sum(loss),
            "count": jnp.sum(mask, dtype=jnp.int32),
            "top1": jnp.sum(top1, dtype=jnp.int32),
            "top5": jnp.sum(top5, dtype=jnp.int32),
            "class_count": jnp.sum(per_class * mask[:, None], axis=0),
            "class_top1": jnp.sum(per_class * top1[:, None], axis=0),
        }
        return jax.tree.map(jnp.add, totals, sums)

    return step


def no_totals(classes: int) -> dict[str, Any]:
    """The totals before the first batch of an evaluation."""
    whole = {name: jnp.zeros((), jnp.int32) for name in ("count", "top1", "top5")}
    each = {name: jnp.zeros((classes,), jnp.int32) for name in ("class_count", "class_top1")}
    return {"loss": jnp.zeros((), jnp.float32), **whole, **each}


def model_input(images: jax.Array, data: config.Data, model: config.Model, *, augment_on_device: bool) -> jax.Array:
    """uint8 [B, h, w, c] -> what the model takes, without augmentation; augment_on_device as in `make_train_step`."""
    size = pair(model.image_size)
    if augment_on_device and data.eval_crop is not None:
        top, left, height, width = crop.centre_box(images.shape[1], images.shape[2], size, data.eval_crop)
        images = images[:, top : top + height, left : left + width]
    images = augment.normalise(images, data.mean, data.std)
    return augment.resize(images, size, data.interpolation).astype(model.dtype)
