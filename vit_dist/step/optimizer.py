"""From a config to one optax transformation: clip, direction, weight decay, per-parameter rates, schedule.

Every optimizer is that chain and differs in the direction only, so weight decay, rules and schedule mean the same for
all of them. A parameter is known by its path (`blocks/mlp/up/kernel`). Those of the blocks may be stacked on a leading
axis, one slice a block; whatever takes a norm or a mean of a whole parameter does so slice by slice (`_per_block`).
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_dist import config
from vit_dist.config import ConfigError, Rule
from vit_dist.schema import one_of
from vit_dist.step import muon
from vit_dist.step.schedule import make_schedule

Params = Any  # a nested dict of arrays, or what optax makes of one


def make_optimizer(settings: config.Optimizer, total_steps: int) -> optax.GradientTransformationExtraArgs:
    """The whole update rule; `update(gradients, state, params)` returns what to add to the parameters.

    Each step adds -rate * (direction + weight_decay * parameter), where the rate is the schedule's times the
    parameter's rule. Weight decay is thus AdamW's (Loshchilov & Hutter 2019, arXiv:1711.05101) whatever the direction,
    and reaches kernels alone unless a rule says otherwise; in LAMB it is part of what the trust ratio scales, as
    published. Frozen parameters get no state, no update and no part in the norm that is clipped.

    Directions: `sgd` (momentum, nesterov) · `adam`, `adamw` (the same, the decay being AdamW's in both) · `lion` ·
    `lamb` (the trust ratio is for kernels alone: it would hold biases, which start at zero, near zero) ·
    `adafactor` (Zhai et al. 2022, arXiv:2106.04560: first moment kept, its decay b1, second moment's decay at most
    b2, no scaling by the parameter's size, so that Adam's rate and decay suit it) · `muon` (kernels of the blocks:
    momentum, nesterov; everything else: Adam with b1, b2).

    The state has the parameters' shardings: make it by `init` on arrays, or `jax.eval_shape` of it, under the mesh.
    `init` raises `ConfigError` for a rule that holds for no parameter.
    """
    name = one_of("optimizer.name", settings.name, DIRECTIONS)
    rules = settings.rules
    for i, rule in enumerate(rules):
        try:
            re.compile(rule.path)
        except re.error as error:
            raise ConfigError(f"optimizer.rules[{i}].path: {rule.path!r} is no regular expression: {error}") from error
    parts = [] if settings.clip is None else [optax.clip_by_global_norm(settings.clip)]
    parts.append(DIRECTIONS[name](settings))
    for factor in sorted({0.0, 1.0} | {rule.weight_decay for rule in rules if rule.weight_decay is not None}):
        if factor * settings.weight_decay:
            where = _by_path(rules, functools.partial(_decays_by, factor))
            parts.append(optax.add_decayed_weights(factor * settings.weight_decay, where))
    if name == "lamb":
        where = _by_path((), lambda path, _: is_kernel(path))
        parts.append(optax.masked(_per_block(optax.scale_by_trust_ratio()), where))
    for factor in sorted({rule.learning_rate for rule in rules} - {1.0}):
        where = _by_path(rules, functools.partial(_scales_by, factor))
        parts.append(optax.masked(optax.scale(factor), where))
    parts.append(optax.scale_by_learning_rate(make_schedule(settings, total_steps)))
    optimizer = optax.chain(*parts)
    if any(rule.frozen for rule in rules):
        labels = _by_path(rules, lambda _, rule: "frozen" if rule.frozen else "trained")
        optimizer = optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)

    def init(params: Params) -> optax.OptState:
        _check_rules(rules, jax.tree.leaves(parameter_paths(params)))
        return optimizer.init(params)

    return optax.GradientTransformationExtraArgs(init, optimizer.update)


def parameter_paths(params: Params) -> Any:
    """The tree with each array replaced by its path, such as `blocks/mlp/up/kernel`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params
    )


def is_kernel(path: str) -> bool:
    """Whether the parameter of this path multiplies features, as opposed to biases, norms, tokens and positions."""
    return path.rpartition("/")[2] == "kernel"


def trainable(params: Params, rules: tuple[Rule, ...]) -> Any:
    """The tree with each array replaced by whether it is trained, that is, not frozen by its rule."""
    return _by_path(rules, lambda _, rule: not rule.frozen)(params)


def _rule_of(path: str, rules: tuple[Rule, ...]) -> Rule:
    return next((rule for rule in rules if re.search(rule.path, path)), Rule())


def _by_path(rules: tuple[Rule, ...], answer: Callable[[str, Rule], Any]) -> Callable[[Params], Any]:
    """The function that optax asks for a tree of masks or labels: the answer to each parameter's path and rule."""
    return lambda params: jax.tree.map(lambda path: answer(path, _rule_of(path, rules)), parameter_paths(params))


def _decays_by(factor: float, path: str, rule: Rule) -> bool:
    return factor == (float(is_kernel(path)) if rule.weight_decay is None else rule.weight_decay)


def _scales_by(factor: float, path: str, rule: Rule) -> bool:
    return factor == rule.learning_rate


def _check_rules(rules: tuple[Rule, ...], paths: list[str]) -> None:
    held = [next((i for i, rule in enumerate(rules) if re.search(rule.path, path)), None) for path in paths]
    for i, rule in enumerate(rules):
        if i not in held:
            matches = any(re.search(rule.path, path) for path in paths)
            found = "matches only parameters that an earlier rule takes" if matches else "matches no parameter"
            raise ConfigError(
                f"optimizer.rules[{i}].path: {rule.path!r} {found}; the parameters are such as {', '.join(paths[:3])}"
            )


def _per_block(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on each block's slice of the stacked parameters by itself, and on the others as they are."""

    def mapped(function: Callable[..., Any]) -> Callable[..., Any]:
        # vmap wants at least one array; there is none where a model has no blocks or they are all frozen
        return lambda *trees: (jax.vmap(function) if jax.tree.leaves(trees[0]) else function)(*trees)

    stacked = optax.GradientTransformation(mapped(inner.init), mapped(inner.update))
    labels = _by_path((), lambda path, _: "stacked" if muon.is_stacked(path) else "single")
    return optax.partition({"stacked": stacked, "single": inner}, labels)


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
