"""The step of an evaluation, a pure function to compile, and the model's input without augmentation.

The sums over batches stay on the devices until the evaluation ends, so that no device waits for the host.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vit_dist import config
from vit_dist.config import pair
from vit_dist.data.pictures import crop, crop_modes
from vit_dist.mesh.feed import Batch
from vit_dist.step import augment, losses
from vit_dist.step.state import ModelFunction, Parameters


def make_evaluation_step(
    settings: config.Config, model: ModelFunction, *, augment_on_device: bool
) -> Callable[[Parameters, Batch, dict[str, jax.Array]], dict[str, jax.Array]]:
    """Makes the function `step(parameters, batch, totals) -> totals`, which adds the sums over a batch.

    A batch has `image` uint8 [B, h, w, c], `label` int32 [B] and `mask` bool [B]; rows whose mask is False do not
    count. Totals are `loss` float32; `count`, `top1`, `top5` int32; `class_count`, `class_top1` int32 [classes].

    Args:
      settings: the run's config.
      model: the model function.
      augment_on_device: as in `make_train_step`.
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


def evaluation_batch_size(settings: config.Config) -> int:
    """Returns how many images an evaluation takes at a time, before that is rounded up for a mesh."""
    return settings.evaluate.batch_size or settings.batch_size


def zero_totals(classes: int) -> dict[str, Any]:
    """Returns the totals before the first batch of an evaluation."""
    counts = {name: jnp.zeros((), jnp.int32) for name in ("count", "top1", "top5")}
    class_counts = {name: jnp.zeros((classes,), jnp.int32) for name in ("class_count", "class_top1")}
    return {"loss": jnp.zeros((), jnp.float32), **counts, **class_counts}


def model_input(images: jax.Array, data: config.Data, model: config.Model, *, augment_on_device: bool) -> jax.Array:
    """Makes the model's input from images, without augmentation.

    Args:
      images: uint8 [B, h, w, c].
      data: crop, interpolation, mean and std.
      model: the input's size and dtype.
      augment_on_device: as in `make_train_step`; True crops here as `data.eval_crop` and `data.eval_crop_mode` say.

    Returns:
      [B, H, W, c] of the model's dtype, normalised.
    """
    size = pair(model.image_size)
    if augment_on_device and data.eval_crop_mode != "fast":
        images = _fit(images, size, data, data.eval_crop_mode)
    elif augment_on_device and data.eval_crop is not None:
        top, left, height, width = crop.centre_box(images.shape[1], images.shape[2], size, data.eval_crop)
        images = images[:, top : top + height, left : left + width]
    images = augment.normalise(images, data.mean, data.std)
    return augment.resize(images, size, data.interpolation).astype(model.dtype)


def _fit(images: jax.Array, size: tuple[int, int], data: config.Data, mode: crop_modes.CropMode) -> jax.Array:
    """Brings images [B, h, w, c] to `size` as `crop_modes.fit` does, to within a grey level; float32.

    With bicubic, which overshoots, the order and the rounding between the two directions are torchvision's.
    """
    sides = crop_modes.place((images.shape[1], images.shape[2]), size, mode, data.eval_crop or 1.0, data.eval_rounding)
    height, width = sides
    wide = _levels(augment.resize(images, (images.shape[1], width.resized), data.interpolation), data)
    resized = _levels(augment.resize(wide, (height.resized, width.resized), data.interpolation), data)
    kept = resized[:, height.cut : height.cut + height.kept, width.cut : width.cut + width.kept]
    fill = jnp.asarray(crop_modes.fill_levels(data.mean, images.shape[3]), jnp.float32)
    edges = ((0, 0), (height.before, height.after), (width.before, width.after), (0, 0))
    return jnp.pad(kept - fill, edges) + fill


def _levels(images: jax.Array, data: config.Data) -> jax.Array:
    """Returns bicubic sums as grey levels of 0 to 255; float32."""
    images = images.astype(jnp.float32)
    return jnp.clip(jnp.round(images), 0, 255) if data.interpolation == "bicubic" else images
