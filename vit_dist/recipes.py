"""A recipe file and what the command line says of it, made into a `Config`.

A recipe is a Python file whose `get_config()` returns the schema's defaults with its own changes. Overrides such as
`model.depth=4` are read as YAML, with the type that the schema declares for their key.
"""

import dataclasses
import importlib.util
import json
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import ml_collections
import yaml

from vit_dist import configs
from vit_dist.config import Config, ConfigError, resolve, to_dict, typed
from vit_dist.paths import expanded
from vit_dist.schema import check_known, flatten, near_miss

Recipe: TypeAlias = str | Path | Config | ml_collections.ConfigDict
Overrides: TypeAlias = (
    Iterable[str] | Mapping[str, Any]
)  # `model.depth=4`; or {"model.depth": 4}, {"model": {"depth": 4}}


def load_config(recipe: Recipe, overrides: Overrides = ()) -> Config:
    """The config of a run, checked.

    Args:
      recipe: the name or file of a recipe, such as `digits`; or a config that another call or a recipe has returned.
      overrides: what is to differ from it, as texts like `model.depth=4` or as keys and values.

    Returns:
      The config, as `train`, `plan` and the others take it.

    Raises:
      ConfigError: naming the key or file that is wrong.
    """
    if isinstance(recipe, str | Path):
        return load(recipe, overrides)
    if isinstance(recipe, ml_collections.ConfigDict):
        return resolve(override(to_dict(typed(recipe.to_dict())), overrides))
    if not isinstance(recipe, Config):
        raise ConfigError(f"config: expected a recipe's name or file, or a config, found {type(recipe).__name__}")
    return resolve(override(to_dict(recipe), overrides)) if overrides else recipe


def load(recipe: str | Path, overrides: Overrides = ()) -> Config:
    """Runs a recipe's `get_config()`, applies overrides such as `model.depth=4`, and resolves.

    recipe: a file, or the name of one as `find` knows it. Raises `ConfigError` for a missing or broken file, an unknown
    key, an ill-typed value or keys that contradict each other.
    """
    path = find(recipe)
    values = _run_recipe(path)
    try:
        written = typed(values.to_dict())
    except ConfigError as error:  # the file's own, before the command line has had its say
        raise ConfigError(f"{path}: {error}") from error
    return resolve(override(to_dict(written), overrides))


def find(recipe: str | Path) -> Path:
    """The file of a recipe: a path that exists, or a name such as `digits` that one of `folders` has.

    Raises `ConfigError` where there is none.
    """
    path = expanded(recipe, "config")
    if path.is_file():
        if path.suffix != ".py":
            raise ConfigError(f"{recipe}: a config file is a Python file, .py, such as configs/digits.py")
        return path
    if path.name == str(recipe) and path.suffix in ("", ".py"):
        known = {file.stem: file for folder in reversed(folders()) for file in folder.glob("*.py")}
        if path.stem in known:
            return known[path.stem]
        meant = near_miss(path.stem, known)
    else:
        meant = near_miss(path.name, [file.name for file in path.parent.glob("*.py")])
    what = "is a folder, not a config file" if path.is_dir() else "no such config file"
    raise ConfigError(f"{recipe}: {what}{meant}")


def folders() -> list[Path]:
    """Where recipes are looked for by name: `configs` in the current folder, then this package's own."""
    here = Path("configs")
    own = [] if here.resolve() == configs.FOLDER.resolve() else [configs.FOLDER]
    return [folder for folder in (here, *own) if folder.is_dir()]


# What a mistake in a recipe raises, which is the user's own program.
_RECIPE_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


def _run_recipe(path: Path) -> ml_collections.ConfigDict:
    """What `get_config()` returns. A recipe may import those beside it, and have dataclasses of its own."""
    spec = importlib.util.spec_from_file_location(f"vit_dist_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    beside = str(path.parent.resolve())
    sys.path.insert(0, beside)
    sys.modules[spec.name] = module  # where dataclasses look up what their annotations name
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{path}: defines no get_config(); see configs/digits.py for what a recipe is")
        recipe = module.get_config()
    except SyntaxError as error:
        raise ConfigError(f"{path}{f':{error.lineno}' if error.lineno else ''}: {error.msg}") from error
    except ConfigError:
        raise
    except _RECIPE_ERRORS as error:
        raise ConfigError(f"{path}{_line_in(path, error)}: {_say_error(error)}") from error
    finally:
        sys.path.remove(beside)
    if not isinstance(recipe, ml_collections.ConfigDict):
        raise ConfigError(
            f"{path}: get_config() returned {type(recipe).__name__}, expected a ConfigDict, such as "
            "vit_dist.config.default_config() returns"
        )
    return recipe


def _line_in(path: Path, error: Exception) -> str:
    """The last line of the file on the way to the error, such as ":12"."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f":{lines[-1]}" if lines else ""


def _say_error(error: Exception) -> str:
    """An exception of a recipe in one line; what a ConfigDict says of an unknown key is a KeyError within another."""
    inner = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    text = str(inner.args[0]) if isinstance(inner, KeyError) and inner.args else str(inner)
    return f"{type(error).__name__}: {' '.join(text.split())}"


def override(values: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Applies `a.b=value` assignments; values are read as YAML, so `true`, `1e-3`, `[96,128]` and `null` are typed."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides: expected several such as ['seed=1'], or keys and values, found {overrides!r}")
    if isinstance(overrides, Mapping):
        overrides = [assignment(key, value) for key, value in flatten(overrides).items()]
    for one in overrides:
        key, equals, text = one.partition("=")
        if not equals:
            raise ConfigError(f"{key}: an override is written key=value, such as --config.{key}=1")
        *parents, leaf = key.split(".")
        if not all((*parents, leaf)):
            raise ConfigError(f"{one}: names no key; an override is written like --config.model.depth=4")
        node, hint = values, Config
        for depth, parent in enumerate(parents):
            check_known(hint, parent, ".".join(parents[:depth]), Config)
            hint = typing.get_type_hints(hint)[parent]
            node = node[parent]
            if not dataclasses.is_dataclass(hint):
                raise ConfigError(f"{key}: {'.'.join(parents[: depth + 1])} is a value and has no keys below it")
        check_known(hint, leaf, ".".join(parents), Config)
        wanted = typing.get_type_hints(hint)[leaf]
        if not text:
            none = f", or {key}=null for none" if type(None) in typing.get_args(wanted) else ""
            raise ConfigError(f"{key}: no value is given; write {key}=VALUE{none}")
        node[leaf] = _parse(text, wanted, key)
    return values


def assignment(key: str, value: Any) -> str:
    """`key=value` as `override` reads it."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _parse(text: str, hint: Any, key: str) -> Any:
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if hint is str or (optional and str in typing.get_args(hint) and text.lower() not in ("null", "none")):
        return text
    try:
        value = yaml.safe_load(f"[{text[1:-1]}]" if text.startswith("(") and text.endswith(")") else text)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError for what looks like a date and is none
        raise ConfigError(f"{key}: cannot read {text!r} as a value") from error
    if isinstance(value, str) and value.lower() == "none" and type(None) in typing.get_args(hint):
        return None
    return [_number(one) for one in value] if isinstance(value, list) else _number(value)


def _number(value: Any) -> Any:
    """A number that YAML 1.1 takes for text, such as 1e-3; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
