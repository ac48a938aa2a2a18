"""Makes a `Config` of a recipe and overrides.

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
    """Makes and checks the config of a run.

    Args:
      recipe: the name or file of a recipe, such as `digits`; or a config that another call or a recipe returned.
      overrides: changes of it, as texts like `model.depth=4` or as keys and values.

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
    """Runs a recipe's `get_config()`, applies overrides such as `model.depth=4`, and checks the result.

    `recipe` is a name or file, as in `find`. Raises `ConfigError` for a missing or broken file, an unknown key, a value
    of the wrong type or keys that contradict each other.
    """
    path = find(recipe)
    values = _run_recipe(path)
    try:
        written = typed(values.to_dict())
    except ConfigError as error:  # of the file itself, without the overrides
        raise ConfigError(f"{path}: {error}") from error
    return resolve(override(to_dict(written), overrides))


def find(recipe: str | Path) -> Path:
    """Returns the file of a recipe: a path that exists, or a file of that name in one of `folders`.

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
    """Returns the folders of recipes that have names: `configs` in the current folder, then the package's own."""
    current = Path("configs")
    own = [] if current.resolve() == configs.FOLDER.resolve() else [configs.FOLDER]
    return [folder for folder in (current, *own) if folder.is_dir()]


# Exceptions that a user's recipe can raise.
_RECIPE_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


def _run_recipe(path: Path) -> ml_collections.ConfigDict:
    """Returns what `get_config()` returns. A recipe may import its neighbours and define dataclasses."""
    spec = importlib.util.spec_from_file_location(f"vit_dist_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.resolve())
    before = set(sys.modules)
    sys.path.insert(0, folder)
    sys.modules[spec.name] = module  # dataclasses look up the names in their annotations there
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
        raise ConfigError(f"{path}{_line_in(path, error)}: {_error_text(error)}") from error
    finally:
        sys.path.remove(folder)
        for name in sys.modules.keys() - before - {spec.name}:  # a recipe of another folder has other neighbours
            if str(Path(getattr(sys.modules[name], "__file__", None) or "").parent) == folder:
                del sys.modules[name]
    if not isinstance(recipe, ml_collections.ConfigDict):
        raise ConfigError(
            f"{path}: get_config() returned {type(recipe).__name__}, expected a ConfigDict, such as "
            "vit_dist.config.default_config() returns"
        )
    return recipe


def _line_in(path: Path, error: Exception) -> str:
    """Returns the line of the recipe that raised the error, such as ":12"."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f":{lines[-1]}" if lines else ""


def _error_text(error: Exception) -> str:
    """Returns an exception of a recipe in one line. A ConfigDict wraps the KeyError of an unknown key in another."""
    inner = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    text = str(inner.args[0]) if isinstance(inner, KeyError) and inner.args else str(inner)
    return f"{type(error).__name__}: {' '.join(text.split())}"


def override(values: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Applies `a.b=value` assignments to the values; reads each as YAML: `true`, `1e-3`, `[96,128]`, `null`."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides: expected a list such as ['seed=1'], or keys and values, found {overrides!r}")
    if isinstance(overrides, Mapping):
        overrides = [assignment(key, value) for key, value in flatten(overrides).items()]
    for change in overrides:
        key, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"{key}: an override is written key=value, such as --config.{key}=1")
        *parents, leaf = key.split(".")
        if not all((*parents, leaf)):
            raise ConfigError(f"{change}: names no key; an override is written like --config.model.depth=4")
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
    """Returns `key=value` as `override` reads it."""
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
    if isinstance(value, list):
        texts = typing.get_args(hint)[:1] == (str,)  # such as "3", the name of a class
        return value if texts else [_number(item) for item in value]
    return _number(value)


def _number(value: Any) -> Any:
    """Returns the number that YAML 1.1 takes for text, such as 1e-3, and any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
