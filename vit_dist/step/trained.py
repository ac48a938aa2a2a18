"""Which parameters a run trains: what `lora`, `init.freeze` and the optimizer's rules leave of all.

The others are no argument of the gradient, so they cost no backward pass, no reduction, no optimizer state and no
update.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vit_dist.config import Config, ConfigError, Rule
from vit_dist.model.shape import shape_of

Tree = dict[str, Any]  # nested, as `state.Parameters`

_LAST = re.compile(r"all_but_last_(\d+)")
# What comes before the blocks, by path.
EMBEDDING = "patch|cls|position|registers|embedding_norm"


def rules_of(settings: Config) -> tuple[Rule, ...]:
    """Returns the rules of a run, of which the first that matches a path counts.

    They are what `lora` and `init.freeze` freeze, then those of the optimizer.

    Raises:
      ConfigError: for an `init.freeze` that the model's blocks do not allow.
    """
    freeze, rules = settings.init.freeze, []
    if settings.lora.rank:
        if not settings.lora.targets:
            raise ConfigError("lora.targets: none, but lora.rank is set; name some of qkv, projection, mlp")
        if freeze == "backbone":
            raise ConfigError("init.freeze: backbone, which holds the adapters of lora.rank too; leave out one of them")
        rules.append(Rule("^(?!head/)(?!.*/lora/)", frozen=True))
    last = _LAST.fullmatch(freeze)
    if last:
        first = _first_trained(settings, int(last.group(1)))
        numbers = "|".join(map(str, range(first)))
        rules.append(Rule(f"^({EMBEDDING}{f'|blocks/({numbers})' if numbers else ''})(/|$)", frozen=True))
    elif freeze == "backbone":
        rules.append(Rule("^(?!head/)", frozen=True))
    elif freeze != "none":
        rules.append(Rule(freeze, frozen=True))
    return (*rules, *settings.optimizer.rules)


def cuts_blocks(settings: Config) -> bool:
    """Returns whether `init.freeze` trains some of the blocks, which are then not stacked."""
    return _LAST.fullmatch(settings.init.freeze) is not None


def passes(settings: Config) -> float:
    """Returns what a training step costs in forward passes, by what `lora` and `init.freeze` train.

    The gradients of activations and of kernels cost a pass each: both, of what is trained; of activations alone, for
    adapters; none before the first block that is trained. What adapters and the head add is left out, and an expression
    of `init.freeze` and the optimizer's rules count as if all were trained.
    """
    freeze = settings.init.freeze
    last = _LAST.fullmatch(freeze)
    backward = 1.0 if settings.lora.rank else 0.0 if freeze == "backbone" else 2.0
    return 1 + backward * (int(last.group(1)) / shape_of(settings.model).depth if last else 1.0)


def _first_trained(settings: Config, count: int) -> int:
    depth = shape_of(settings.model).depth
    if not 0 < count <= depth:
        raise ConfigError(
            f"init.freeze: {settings.init.freeze}, but the model has {depth} blocks; take 1 to {depth}, or backbone"
        )
    if settings.model.scan is True:
        raise ConfigError(f"init.freeze: {settings.init.freeze} needs blocks of their own; set model.scan=false")
    return depth - count


def check_expressions(rules: Sequence[Rule], own: int) -> None:
    """Raises `ConfigError` for a path that is no regular expression; the last `own` rules are the optimizer's."""
    for rule, name in zip(rules, _names(rules, own), strict=True):
        try:
            re.compile(rule.path)
        except re.error as error:
            raise ConfigError(f"{name}: {rule.path!r} is no regular expression: {error}") from error


def check(rules: Sequence[Rule], own: int, paths: Sequence[str]) -> None:
    """Raises `ConfigError` for a rule that no parameter uses, and where all parameters are frozen."""
    first_rules = [next((i for i, rule in enumerate(rules) if re.search(rule.path, path)), None) for path in paths]
    such = f"the parameters are such as {', '.join(paths[:3])}"
    names = _names(rules, own)
    for i, (rule, name) in enumerate(zip(rules, names, strict=True)):
        if i not in first_rules:
            matches = any(re.search(rule.path, path) for path in paths)
            problem = "matches only parameters that an earlier rule takes" if matches else "matches no parameter"
            if not matches and re.search(r"blocks/[\d(\[]", rule.path) and _stacked(paths):
                problem += " (those of all blocks are one array; set model.scan=false)"
            raise ConfigError(f"{name}: {rule.path!r} {problem}; {such}")
    if all(i is not None and rules[i].frozen for i in first_rules):
        raise ConfigError(f"{names[0]}: all parameters are frozen; {such}")


def _stacked(paths: Sequence[str]) -> bool:
    return any(re.match(r"blocks/\D", path) for path in paths)


def _names(rules: Sequence[Rule], own: int) -> list[str]:
    return ["init.freeze"] * (len(rules) - own) + [f"optimizer.rules[{i}].path" for i in range(own)]


def rule_of(path: str, rules: Sequence[Rule]) -> Rule:
    """Returns the first rule that matches the path of a parameter, or the default."""
    return next((rule for rule in rules if re.search(rule.path, path)), Rule())


def parted(parameters: Tree, rules: Sequence[Rule]) -> tuple[Tree, Tree]:
    """Returns the parameters that are trained, and those that are frozen; both are nested like `parameters`."""
    parts: tuple[Tree, Tree] = ({}, {})
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        keys = [key.key for key in path]
        into = parts[rule_of("/".join(map(str, keys)), rules).frozen]
        for key in keys[:-1]:
            into = into.setdefault(key, {})
        into[keys[-1]] = leaf
    return parts


def rejoined(one: Mapping[str, Any], other: Mapping[str, Any]) -> Tree:
    """Returns the tree of which two were parted."""

    def of(key: Any) -> Any:
        if key in one and key in other:
            return rejoined(one[key], other[key])
        return one[key] if key in one else other[key]

    return {key: of(key) for key in {**one, **other}}
