"""Makes an optax optimizer from a config: clip, direction, weight decay, per-parameter rates, schedule.

Every optimizer is that chain and differs in the direction only, so weight decay, rules and schedule mean the same for
all of them. A parameter is named by its path (`blocks/mlp/up/kernel`). The parameters of the blocks may be stacked on a
leading axis, one slice per block; transformations that take a norm or a mean do so slice by slice (`_per_block`).
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_dist import config
from vit_dist.config import Rule
from vit_dist.mesh import layout
from vit_dist.schema import one_of
from vit_dist.step import arrays, muon, trained
from vit_dist.step.schedule import make_schedule

Params = Any  # a nested dict of arrays, or a tree that optax makes of one


def make_optimizer(
    settings: config.Optimizer, total_steps: int, *, rules: tuple[Rule, ...] | None = None, depth: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Makes the optimizer; `update(gradients, state, params)` returns the updates to add to the parameters.

    `init` takes all parameters, and `update` those that are trained (`trained.parted`).

    Each step adds -rate * (direction + weight_decay * parameter), where the rate is the schedule's times that of the
    parameter's rule. Weight decay is thus AdamW's (Loshchilov & Hutter 2019, arXiv:1711.05101) for every direction. It
    applies to kernels only, unless a rule sets it; in LAMB the trust ratio scales it too, as published. Frozen
    parameters have no state and no update, and do not count in the norm that is clipped. `layer_decay` multiplies what
    the rules have made of the rate.

    Directions:

    - `sgd`: with momentum and nesterov.
    - `adam`, `adamw`: the same, because both have AdamW's weight decay.
    - `lion`.
    - `lamb`: the trust ratio is for kernels only; it would keep biases, which start at zero, near zero.
    - `adafactor` (Zhai et al. 2022, arXiv:2106.04560): with a first moment of decay b1 and a second of decay at most
      b2, not scaled by the parameter's size, so that Adam's learning rate and weight decay suit it.
    - `muon`: for kernels of the blocks, with momentum and nesterov; Adam with b1 and b2 for the others.

    The state has the parameters' shardings: make it under the mesh, by `init` on arrays or `jax.eval_shape` of `init`.

    Args:
      settings: the config's section.
      total_steps: the length of the schedule.
      rules: those of the run (`trained.rules_of`), which end with those of `settings`; None: these alone.
      depth: the number of blocks, for `layer_decay`.

    Raises `ConfigError` for an unknown direction or an invalid rule; `init` does for a rule that no parameter uses.
    """
    name = one_of("optimizer.name", settings.name, DIRECTIONS)
    rules = settings.rules if rules is None else rules
    trained.check_expressions(rules, len(settings.rules))
    transforms = [] if settings.clip is None else [_clip(settings.clip)]
    transforms.append(DIRECTIONS[name](settings))
    for factor in sorted({0.0, 1.0} | {rule.weight_decay for rule in rules if rule.weight_decay is not None}):
        if factor * settings.weight_decay:
            mask = _by_path(rules, functools.partial(_decays_by, factor))
            transforms.append(optax.add_decayed_weights(factor * settings.weight_decay, mask))
    if name == "lamb":
        mask = _by_path((), lambda path, _: is_kernel(path))
        transforms.append(optax.masked(_per_block(optax.scale_by_trust_ratio()), mask))
    for factor in sorted({rule.learning_rate for rule in rules} - {1.0}):
        mask = _by_path(rules, functools.partial(_scales_by, factor))
        transforms.append(optax.masked(optax.scale(factor), mask))
    if settings.layer_decay < 1:
        assert depth is not None
        transforms.append(optax.stateless(lambda updates, _: _decayed(updates, settings.layer_decay, depth)))
    transforms.append(optax.scale_by_learning_rate(make_schedule(settings, total_steps)))
    optimizer = optax.chain(*transforms)

    def init(params: Params) -> optax.OptState:
        trained.check(rules, len(settings.rules), jax.tree.leaves(parameter_paths(params)))
        return optimizer.init(trained.parted(params, rules)[0])

    return optax.GradientTransformationExtraArgs(init, optimizer.update)


def parameter_paths(params: Params) -> Any:
    """Returns the tree with each array replaced by its path, such as `blocks/mlp/up/kernel`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params
    )


def is_kernel(path: str) -> bool:
    """Returns whether the parameter of this path multiplies features: no bias, norm, token or position embedding."""
    return path.rpartition("/")[2] == "kernel"


def _by_path(rules: tuple[Rule, ...], label: Callable[[str, Rule], Any]) -> Callable[[Params], Any]:
    """Returns a function from parameters to a tree of masks or labels for optax, `label(path, rule)` for each."""
    return lambda params: jax.tree.map(lambda path: label(path, trained.rule_of(path, rules)), parameter_paths(params))


def _decays_by(factor: float, path: str, rule: Rule) -> bool:
    return factor == (float(is_kernel(path)) if rule.weight_decay is None else rule.weight_decay)


def _scales_by(factor: float, path: str, rule: Rule) -> bool:
    return factor == rule.learning_rate


def _decayed(updates: Params, decay: float, depth: int) -> Params:
    """Scales updates by `decay` once for every layer that follows theirs; see `layers_after`."""

    def scaled(path: tuple, update: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not muon.is_stacked(name):
            return update * decay ** layers_after(name, depth)
        factors = decay ** np.arange(depth, 0, -1, dtype=np.float32)
        split = layout.stored_spec(update)
        return update * jax.lax.broadcast_in_dim(jnp.asarray(factors), update.shape, (0,), out_sharding=split)

    return jax.tree.map_with_path(scaled, updates)


def layers_after(path: str, depth: int) -> int:
    """Returns how many layers follow that of a parameter: none for the head, depth + 1 for the embedding.

    It is BEiT's numbering (Bao et al. 2021, arXiv:2106.08254): what follows the blocks counts as the head's layer.
    """
    parts = path.split("/")
    if parts[0] == "blocks":
        return depth - int(parts[1])
    return depth + 1 if re.match(f"({trained.EMBEDDING})(/|$)", path) else 0


def _per_block(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `inner` to each block's slice of a stacked parameter separately, and to the other parameters directly."""

    def mapped(function: Callable[..., Any]) -> Callable[..., Any]:
        # vmap needs at least one array; there is none if the model has no blocks or all of them are frozen
        return lambda *trees: (jax.vmap(function) if jax.tree.leaves(trees[0]) else function)(*trees)

    stacked = optax.GradientTransformation(mapped(inner.init), mapped(inner.update))
    labels = _by_path((), lambda path, _: "stacked" if muon.is_stacked(path) else "single")
    return optax.partition({"stacked": stacked, "single": inner}, labels)


def _clip(limit: float) -> optax.GradientTransformation:
    """Scales gradients whose norm is above `limit` down to it, as `optax.clip_by_global_norm` does."""
    return optax.stateless(
        lambda gradients, _: optax.tree.scale(jnp.minimum(1.0, limit / arrays.norm(gradients)), gradients)
    )


def _sgd(settings: config.Optimizer) -> optax.GradientTransformation:
    if not settings.momentum:
        return optax.identity()
    return optax.trace(settings.momentum, settings.nesterov, accumulator_dtype=settings.moment_dtype)


def _adam(settings: config.Optimizer) -> optax.GradientTransformation:
    return optax.scale_by_adam(
        settings.b1, settings.b2, settings.eps, mu_dtype=settings.moment_dtype, nesterov=settings.nesterov
    )


def _lion(settings: config.Optimizer) -> optax.GradientTransformation:
    return optax.scale_by_lion(settings.b1, settings.b2, mu_dtype=settings.moment_dtype)


def _adafactor(settings: config.Optimizer) -> optax.GradientTransformation:
    second = optax.scale_by_factored_rms(
        min_dim_size_to_factor=32,  # a head is 64 wide, and optax's 128 would leave its kernels unfactored
        decay_rate_fn=lambda step, power: jnp.minimum(1.0 - (step + 1.0) ** -power, settings.b2),
    )
    first = optax.ema(settings.b1, debias=False, accumulator_dtype=settings.moment_dtype)
    return optax.chain(_per_block(second), first) if settings.b1 else _per_block(second)


def _muon(settings: config.Optimizer) -> optax.GradientTransformation:
    matrices = muon.scale_by_muon(settings.momentum, settings.nesterov, settings.moment_dtype)
    labels = _by_path((), lambda path, _: "muon" if muon.is_matrix(path) else "adam")
    return optax.partition({"muon": matrices, "adam": _adam(settings)}, labels)


DIRECTIONS: dict[str, Callable[[config.Optimizer], optax.GradientTransformation]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adam,
    "lion": _lion,
    "lamb": _adam,
    "adafactor": _adafactor,
    "muon": _muon,
}
