"""The training step, a pure function to compile.

Every random number of a step depends on the seed, the step's number and an example's row in the global batch only, so
the loss curve is the same on any mesh. With micro-batches gradients are summed on each device and reduced
over `data` once per step; over `fsdp` once per step or per micro-batch (`accumulate_gather`).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vit_dist import config
from vit_dist.config import pair
from vit_dist.mesh import layout
from vit_dist.mesh.feed import Batch
from vit_dist.step import arrays, augment, losses, trained
from vit_dist.step.state import ModelFunction, Parameters, State

Metrics = dict[str, jax.Array]


def make_train_step(
    settings: config.Config,
    model: ModelFunction,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    augment_on_device: bool,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Makes the function `step(state, batch) -> (state, metrics)`.

    A batch has `image` uint8 [B, h, w, c] and `label` int32 [B], and `id` with `log_examples`. Metrics are scalars:
    loss, learning_rate, grad_norm and param_norm, of what is trained; with `log_examples` also `ids` int32 [B].

    Args:
      settings: the run's config.
      model: the model function.
      optimizer: as from `make_optimizer`.
      schedule: the learning rate by step, for the metrics.
      augment_on_device: the images are uncropped, at their native size; False: the host has cropped and flipped them.
    """
    data, classes = settings.data, model.settings.num_classes
    assert classes is not None
    if not augment_on_device:
        data = dataclasses.replace(data, crop_area=None, flip=False)
    per_example = losses.LOSSES[settings.loss]

    rules = trained.rules_of(settings)
    gather = settings.accumulate_gather if settings.accumulate_steps > 1 else "microbatch"

    def loss_sum(parameters: Parameters, images: jax.Array, targets: jax.Array, key: jax.Array) -> tuple:
        example_losses = per_example(model(parameters, images, key), targets)
        return jnp.sum(example_losses) / settings.batch_size, example_losses

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        warp_key, mix_key, dropout_key = jax.random.split(key, 3)
        # Bytes until the last possible operation: without a warp, the patches are made from bytes in one kernel.
        images = augment.warp(batch["image"], warp_key, data)
        images = augment.resize(images, pair(model.settings.image_size), data.interpolation)
        targets = losses.one_hot(batch["label"], classes)
        images, targets = augment.mix(
            images, targets, mix_key, mixup=settings.mixup, cutmix=settings.cutmix, repeats=data.repeats
        )
        if settings.binarize_targets:
            targets = losses.binarize(targets)
        targets = losses.smooth(targets, settings.label_smoothing)
        images = augment.normalise(images, data.mean, data.std, model.settings.dtype)

        own, frozen = trained.parted(state.parameters, rules)
        deferred = jax.tree.map(lambda p: layout.defer_reduction(p, gather), frozen)
        gradients, example_losses = sum_gradients(
            lambda own, *arguments: loss_sum(trained.rejoined(own, deferred), *arguments),
            own,
            (images, targets),
            dropout_key,
            micro_batches=settings.accumulate_steps,
            gather=gather,
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, own)
        own = optax.apply_updates(own, updates)
        ema = state.ema
        if ema is not None:
            own_ema, frozen_ema = trained.parted(ema, rules)
            ema = trained.rejoined(average(own_ema, own, settings.ema_decay, state.step), frozen_ema)
        new = State(
            step=state.step + 1,
            parameters=trained.rejoined(own, frozen),
            optimizer=optimizer_state,
            ema=ema,
        )
        metrics = {
            "loss": jnp.mean(example_losses),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norm": arrays.norm(gradients),
            "param_norm": arrays.norm(own),
        }
        if settings.log_examples:
            metrics["ids"] = layout.replicated(batch["id"])
        return new, metrics

    return step


def sum_gradients(
    loss: Callable, parameters: Parameters, batch: tuple, key: jax.Array, *, micro_batches: int, gather: str
) -> tuple[Parameters, jax.Array]:
    """Sums the gradient of a loss over micro-batches.

    Micro-batch i of n holds the rows i, i + n, ...: every device cuts its own rows on any mesh, and no example moves.

    Args:
      loss: `loss(parameters, *batch, key)` returns the loss, a scalar, and the loss of each example.
      parameters: the parameters, as they are stored.
      batch: arrays [B, ...].
      key: the randomness; each of several micro-batches gets a key of its own.
      micro_batches: their number n.
      gather: `config.accumulate_gather`; a single micro-batch gathers each block's parameters when the block runs.

    Returns:
      The sum of gradients, split as the parameters are stored, and the loss of each example.
    """
    differentiate = jax.grad(loss, has_aux=True)
    if micro_batches == 1:
        deferred = jax.tree.map(lambda p: layout.defer_reduction(p, "microbatch"), parameters)
        gradients, example_losses = differentiate(deferred, *batch, key)
        return arrays.reduce_gradients(gradients, parameters), example_losses
    deferred = jax.tree.map(lambda p: layout.defer_reduction(p, gather), parameters)
    sliced = tuple(_slice(array, micro_batches) for array in batch)

    def add(total: Parameters, inputs: tuple) -> tuple[Parameters, jax.Array]:
        rows, own_key = inputs
        gradients, example_losses = differentiate(deferred, *rows, own_key)
        return jax.tree.map(jnp.add, total, gradients), example_losses

    zeros = jax.tree.map(layout.unreduced_zeros, deferred)
    total, example_losses = jax.lax.scan(add, zeros, (sliced, jax.random.split(key, micro_batches)))
    return arrays.reduce_gradients(total, parameters), example_losses


def average(ema: Parameters, parameters: Parameters, decay: float, step: jax.Array) -> Parameters:
    """Returns `ema * d + parameters * (1 - d)`, where d rises from 0.1 to `decay`, to forget the start soon.

    d = min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage.
    """
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (new - old) * (1 - d), ema, parameters)  # exact if nothing changed


def _slice(array: jax.Array, micro_batches: int) -> jax.Array:
    """Cuts [B, ...] to [micro_batches, B / micro_batches, ...]; each device cuts its own rows."""
    dimensions = array.shape[1:]
    shape = (array.shape[0] // micro_batches, micro_batches, *dimensions)
    names = ("batch", None, *(None,) * len(dimensions))
    return jnp.moveaxis(jax.lax.reshape(array, shape, out_sharding=layout.spec(*names)), 1, 0)
