"""One training step, as a pure function to compile.

Everything random in a step follows from the seed, the step's number and an example's place in the global batch, so
the curve is the same on any mesh. With micro-batches each device sums its own gradients, and they are reduced over
devices once.
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
from vit_dist.step import augment, losses
from vit_dist.step.optimizer import trainable
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
    """`step(state, batch) -> (state, metrics)`, where batch has `image` uint8 [B, h, w, c] and `label` int32 [B].

    augment_on_device: the images are whole, at their native size; else the host has cropped and flipped them.
    Metrics are scalars: loss, learning_rate, grad_norm, param_norm; with `log_examples`, `ids` int32 [B] too.
    """
    data, classes = settings.data, model.settings.num_classes
    assert classes is not None
    if not augment_on_device:
        data = dataclasses.replace(data, crop_area=None, flip=False)
    per_example = losses.LOSSES[settings.loss]

    def loss_sum(parameters: Parameters, images: jax.Array, targets: jax.Array, key: jax.Array) -> tuple:
        # What is frozen needs no backward pass, and has no part in the gradient's norm.
        learns = trainable(parameters, settings.optimizer.rules)
        parameters = jax.tree.map(lambda p, on: p if on else jax.lax.stop_gradient(p), parameters, learns)
        each = per_example(model(parameters, images, key), targets)
        return jnp.sum(each) / settings.batch_size, each

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        warp_key, mix_key, dropout_key = jax.random.split(key, 3)
        images = augment.normalise(batch["image"], data.mean, data.std)
        images = augment.warp(images, warp_key, data)
        images = augment.resize(images, pair(model.settings.image_size), data.interpolation)
        targets = losses.one_hot(batch["label"], classes)
        images, targets = augment.mix(images, targets, mix_key, mixup=settings.mixup, cutmix=settings.cutmix)
        if settings.binarize_targets:
            targets = losses.binarize(targets)
        targets = losses.smooth(targets, settings.label_smoothing)
        images = images.astype(model.settings.dtype)

        gradients, each = sum_gradients(
            loss_sum,
            state.parameters,
            (images, targets),
            dropout_key,
            count=settings.accumulate_steps,
            gather=settings.accumulate_gather,
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        new = State(
            step=state.step + 1,
            parameters=parameters,
            optimizer=optimizer_state,
            ema=average(state.ema, parameters, settings.ema_decay, state.step) if state.ema is not None else None,
        )
        metrics = {
            "loss": jnp.mean(each),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norm": optax.tree.norm(gradients),
            "param_norm": optax.tree.norm(parameters),
        }
        if settings.log_examples:
            metrics["ids"] = layout.replicated(batch["id"])
        return new, metrics

    return step


def sum_gradients(
    loss: Callable, parameters: Parameters, batch: tuple, key: jax.Array, *, count: int, gather: str
) -> tuple[Parameters, jax.Array]:
    """The gradient of `loss(parameters, *batch, key)` summed over `count` micro-batches, and the loss of each example.

    Micro-batch i holds the rows i, i + count, ...: every device cuts its own rows, whatever the mesh, and no example
    moves. gather: see `config.accumulate_gather`; one micro-batch gathers each block when its turn comes.
    """
    differentiate = jax.grad(loss, has_aux=True)
    if count == 1:
        whole = jax.tree.map(lambda p: layout.postponed(p, "microbatch"), parameters)
        gradients, each = differentiate(whole, *batch, key)
        return jax.tree.map(layout.as_stored, gradients, parameters), each
    whole = jax.tree.map(lambda p: layout.postponed(p, gather), parameters)
    micro = tuple(_micro_batches(array, count) for array in batch)

    def add(total: Parameters, inputs: tuple) -> tuple[Parameters, jax.Array]:
        rows, own_key = inputs
        gradients, each = differentiate(whole, *rows, own_key)
        return jax.tree.map(jnp.add, total, gradients), each

    zeros = jax.tree.map(layout.unreduced_zeros, whole)
    total, each = jax.lax.scan(add, zeros, (micro, jax.random.split(key, count)))
    return jax.tree.map(layout.as_stored, total, parameters), each


def average(ema: Parameters, parameters: Parameters, decay: float, step: jax.Array) -> Parameters:
    """`ema * d + parameters * (1 - d)`, where d rises from 0.1 to `decay` so that the start is soon forgotten.

    d = min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage.
    """
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (new - old) * (1 - d), ema, parameters)  # exact where nothing changed


def _micro_batches(array: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B / count, ...], each device cutting its own rows."""
    rest = array.shape[1:]
    names = ("batch", None, *(None,) * len(rest))
    parts = jax.lax.reshape(array, (array.shape[0] // count, count, *rest), out_sharding=layout.spec(*names))
    return jnp.moveaxis(parts, 1, 0)
