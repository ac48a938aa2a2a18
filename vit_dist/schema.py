"""Makes typed dataclasses of nested values, with errors that name the key.

The type of a field is the type of its key; `Annotated[int, Bound(...)]` adds the bounds of a number, so that they stand
beside the key.
"""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

_SHORT = {
    "lr": "learning_rate", "wd": "weight_decay", "epochs": "total_epochs", "steps": "total_steps",
    "batch": "batch_size",
}  # fmt: skip


class ConfigError(ValueError):
    """The user asked for something that cannot be done. The message is one line: key or file, problem, what to do."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """The numbers that a key allows, in words and as a test.

    More than `most` would exhaust memory or take for ever; whole numbers end where int32 does.
    """

    wanted: str
    holds: Callable[[float], bool]
    most: float = sys.float_info.max


def above_0(most: float = sys.float_info.max) -> Bound:
    return Bound("above 0", lambda value: value > 0, most)


def from_0(most: float = sys.float_info.max) -> Bound:
    return Bound("0 or more", lambda value: value >= 0, most)


_INT32 = 2**31 - 1
PositiveInt = Annotated[int, above_0(_INT32)]
PositiveFloat = Annotated[float, above_0()]
NonNegativeInt = Annotated[int, from_0(_INT32)]
NonNegativeFloat = Annotated[float, from_0()]
FractionBelowOne = Annotated[float, Bound("in [0, 1)", lambda value: 0 <= value < 1)]
PositiveFraction = Annotated[float, Bound("above 0 and at most 1", lambda value: 0 < value <= 1)]


def build(hint: Any, value: Any, key: str = "") -> Any:
    """Returns `value` as the type `hint` of the field at `key`. Raises `ConfigError` where it is not of that type."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            first = dataclasses.fields(hint)[0].name
            raise ConfigError(
                f"{key or 'config'}: expected keys and values, found {value!r} ({type(value).__name__}); "
                f"set a key of it, such as {key + '.' if key else ''}{first}"
            )
        for name in value:
            check_known(hint, name, key)
        hints = typing.get_type_hints(hint, include_extras=True)
        return typing.cast(type, hint)(
            **{name: build(hints[name], item, f"{key}.{name}" if key else name) for name, item in value.items()}
        )
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        built, bound = build(arguments[0], value, key), arguments[1]
        if not bound.holds(built):
            raise ConfigError(f"{key}: must be {bound.wanted}, found {value}")
        if built > bound.most:
            raise ConfigError(f"{key}: must be at most {bound.most:,}, found {value}")
        return built
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            # A misspelt word of a key that may also be true or false: the error at the end names those, too, whereas
            # that of the option would name its words alone.
            other_text = bool in arguments and isinstance(value, str) and value not in typing.get_args(option)
            if _fits(option, value) and not other_text:
                return build(option, value, key)
    elif origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        items = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(items) == len(value):
            pairs = enumerate(zip(items, value))
            return tuple(build(item_hint, item, f"{key}[{index}]") for index, (item_hint, item) in pairs)
    elif origin is Literal:
        if isinstance(value, str):
            return one_of(key, value, arguments)
    elif _fits(hint, value):
        return hint(value) if hint in (int, float) else value
    written = f"; write [{value}]" if origin is tuple and isinstance(value, str) else ""
    raise ConfigError(f"{key}: expected {describe_type(hint)}, found {value!r} ({type(value).__name__}){written}")


def _fits(hint: Any, value: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        return _fits(typing.get_args(hint)[0], value)
    if typing.get_origin(hint) is tuple:
        arguments = typing.get_args(hint)
        right_length = arguments[-1] is Ellipsis or (hasattr(value, "__len__") and len(value) == len(arguments))
        return isinstance(value, list | tuple) and right_length
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str)
    if hint is types.NoneType:
        return value is None
    if isinstance(value, bool):
        return hint is bool
    if hint is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if hint is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # a whole number may be larger
    return isinstance(value, hint)


def describe_type(hint: Any) -> str:
    """Returns a type in words, with its bounds, such as `a whole number above 0 or null`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{describe_type(arguments[0])} {arguments[1].wanted}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe_type, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list of {describe_type(arguments[0])}"
        return f"({', '.join(map(describe_type, arguments))})"
    if origin is Literal:
        return " | ".join(map(str, arguments))
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    return plain.get(hint) or "{" + ", ".join(field.name for field in dataclasses.fields(hint)) + "}"


def check_known(hint: Any, name: str, parent: str, schema: Any = None) -> None:
    """Raises `ConfigError` where the dataclass `hint`, at key `parent`, has no key `name`.

    The message suggests a near miss there, or a key anywhere in the dataclass `schema`.
    """
    fields = [field.name for field in dataclasses.fields(hint)]
    if name not in fields:
        meant = near_miss(_SHORT.get(name, name), fields, parent) or (elsewhere(name, schema) if schema else "")
        raise ConfigError(f"unknown key {parent + '.' if parent else ''}{name}{meant}")


def elsewhere(name: str, schema: Any, prefix: str = "") -> str:
    """Returns ` (did you mean ...?)` with the keys that end in `name`, its long form or a close word; else nothing."""
    keys = flatten(dataclasses.asdict(schema()))
    ends = {key.rpartition(".")[2] for key in keys}
    wanted = _SHORT.get(name) or next(iter(difflib.get_close_matches(name, ends, n=1, cutoff=0.75)), None)
    meant = [prefix + key for key in keys if key.rpartition(".")[2] == wanted]
    return f" (did you mean {' or '.join(meant)}?)" if meant else ""


def one_of(key: str, value: str, options: Iterable[str]) -> str:
    """Returns `value`. Raises `ConfigError` where it is none of the options, with these and the near miss."""
    options = list(options)
    if value not in options:
        raise ConfigError(f"{key}: {value!r} is none of {', '.join(options)}{near_miss(value, options)}")
    return value


def near_miss(name: str, options: Iterable[str], parent: str = "") -> str:
    """Returns ` (did you mean x?)` for the closest option, or nothing."""
    close = difflib.get_close_matches(name, list(options), n=1)
    return f" (did you mean {parent + '.' if parent else ''}{close[0]}?)" if close else ""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values as one mapping with keys such as `model.depth`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def nearest_multiples(value: int, of: int) -> str:
    """Returns the multiples of `of` on either side of `value` as text for an error: '24 or 32' for 30 and 8."""
    return f"{value // of * of} or {value // of * of + of}" if value >= of else str(of)
