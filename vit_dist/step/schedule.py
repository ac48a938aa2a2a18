"""The learning rate as a function of the step: a warm-up, then one of four shapes, and optionally a cool-down.

Steps count from 0. No step has a rate of zero: a warm-up of w steps starts at 1/w of the peak, and a cosine or a
cool-down reaches zero one step after the last.
"""

import functools

import jax.numpy as jnp
import optax
from absl import logging

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.schema import one_of


@functools.cache  # logs its warning once for each config
def make_schedule(settings: config.Optimizer, total_steps: int) -> optax.Schedule:
    """Makes the function from step to learning rate, for steps 0 to T - 1 of T = `total_steps`.

    With w = `warmup_steps`, e = `end_factor` and progress p = (step - w) / (T - w):

    - warm-up, steps 0 to w - 1: peak * (step + 1) / w;
    - cosine: peak * (e + (1 - e) * (1 + cos(pi * p)) / 2) (Loshchilov & Hutter 2017, arXiv:1608.03983);
    - linear: peak * (1 - (1 - e) * p);
    - rsqrt: peak / sqrt(1 + (step - w) / timescale), almost constant at first (Zhai et al. 2022, arXiv:2106.04560);
    - constant: peak.

    The last c = `cooldown_steps` steps of rsqrt and constant are multiplied by (T - step) / c. A warm-up and cool-down
    that are longer than the run are scaled together to half of it, with a warning.

    Raises `ConfigError` for a cool-down after cosine or linear, which have an end of their own.
    """
    peak = settings.learning_rate
    warmup, cooldown = _fitted(settings.warmup_steps, settings.cooldown_steps, total_steps)
    rest = max(1, total_steps - warmup)
    shapes: dict[str, optax.Schedule] = {
        "cosine": optax.cosine_decay_schedule(peak, rest, settings.end_factor),
        "linear": optax.linear_schedule(peak, peak * settings.end_factor, rest),
        "rsqrt": lambda step: peak / jnp.sqrt(1 + step / settings.rsqrt_timescale),
        "constant": optax.constant_schedule(peak),
    }
    name = one_of("optimizer.schedule", settings.schedule, shapes)
    if settings.cooldown_steps and name in ("cosine", "linear"):
        raise ConfigError(
            f"optimizer.cooldown_steps: goes with the schedules rsqrt and constant, found {name}, "
            f"which ends at optimizer.end_factor; set it to 0"
        )
    schedule = shapes[name]
    if warmup:
        rise = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else optax.constant_schedule(peak)
        schedule = optax.join_schedules([rise, schedule], [warmup])
    if not cooldown:
        return schedule
    return lambda step: schedule(step) * jnp.clip((total_steps - step) / cooldown, 0.0, 1.0)


def _fitted(warmup: int, cooldown: int, total_steps: int) -> tuple[int, int]:
    """Returns the steps of warm-up and cool-down, scaled together to half of the run if they do not fit into it.

    A warm-up as long as the run does not fit either, because the rate would never fall.
    """
    needed = warmup + cooldown
    if needed < total_steps or (needed == total_steps and cooldown):
        return warmup, cooldown
    fitted = warmup * total_steps // (2 * needed), cooldown * total_steps // (2 * needed)
    logging.warning(
        "optimizer: warmup_steps=%d and cooldown_steps=%d do not fit into the run's %d steps; they are scaled to %d "
        "and %d, half of the run",
        *(warmup, cooldown, total_steps, *fitted),
    )
    return fitted
