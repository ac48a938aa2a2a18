"""Opens a checkpoint of an earlier run of ours as weights, of which a process reads what it needs (tensorstore)."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_dist.config import Config, ConfigError
from vit_dist.model import lora
from vit_dist.weights.description import Description
from vit_dist.weights.lazy import Index, Lazy
from vit_dist.weights.naming import Naming
from vit_dist.weights.origin import Origin
from vit_dist.weights.published import Published, shapes_of
from vit_dist.weights.saved_tree import SavedTree
from vit_dist.weights.traits import PREPARED, traits_of


def parameters_of(settings: Config) -> str:
    """Returns which tree of a run's checkpoints is its result: the moving average where the run keeps one."""
    return "ema" if settings.ema_decay else "parameters"


def open_run(
    workdir: Path,
    settings: Config,
    classes: tuple[str, ...],
    step: int,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Published:
    """Returns the parameters of a checkpoint, of their moving average where the run keeps one, with adapters merged.

    Args:
      workdir: the directory of the run.
      settings: its config.
      classes: the names of its classes.
      step: that of the checkpoint.
      tensors: those of the tree `parameters_of`, by name; None: each is read from the disk when it is asked for.
    """
    tree = (workdir / "checkpoints" / str(step) / parameters_of(settings)).resolve()
    stacked, shapes = settings.model.scan, shapes_of(settings.model, settings.lora)
    saved = SavedTree(tree)
    parameters = {path: _parameter(saved, tensors, path, shape, bool(stacked)) for path, shape in shapes.items()}
    parameters = _merged(parameters, lora.factor(settings.lora)) if settings.lora.rank else parameters
    model = traits_of(settings.model)
    data = {f"data.{key}": getattr(settings.data, key) for key in PREPARED}

    def preprocessing(given: Collection[str]) -> dict[str, Any]:
        return {key: value for key, value in data.items() if key not in given}

    described = Description(f"an earlier run, step {step}", model, Naming({}), preprocessing, classes=classes)
    files = tuple(sorted(file for file in tree.rglob("*") if file.is_file()))
    source = dataclasses.replace(settings.model, scan=False)
    taken = {path: [path] for path in parameters}
    return Published(Origin({}, {}, files), described, source, parameters, taken, (), step)


def _parameter(
    saved: SavedTree, tensors: Mapping[str, np.ndarray] | None, path: str, shape: tuple[int, ...], stacked: bool
) -> Lazy:
    parts = path.split("/")
    in_stack = stacked and parts[0] == "blocks"
    name = ".".join([parts[0], *parts[2:]] if in_stack else parts)
    number = int(parts[1]) if in_stack else None

    def compute(index: Index) -> np.ndarray:
        if tensors is not None and name not in tensors:
            raise ConfigError(f"{saved.folder}: holds no {name}, which the run's config.json asks for; restore it")
        stored = saved.open(name) if tensors is None else tensors[name]
        found = tuple(stored.shape[number is not None :])
        if found != shape:
            raise ConfigError(
                f"{saved.folder}: {name} is {list(found)}, but {list(shape)} by the run's config.json; restore it"
            )
        whole_index: Any = index if number is None else (number, *index)
        return saved.read(name, whole_index) if tensors is None else tensors[name][whole_index]

    return Lazy(shape, compute)


def _merged(parameters: dict[str, Lazy], factor: float) -> dict[str, Lazy]:
    """Returns the parameters of a model without adapters that computes the same (`model.lora`)."""
    merged = {path: one for path, one in parameters.items() if "/lora/" not in path}
    for path in merged:
        layer = path.removesuffix("/kernel")
        if f"{layer}/lora/down/kernel" in parameters:
            down, up = (parameters[f"{layer}/lora/{part}/kernel"] for part in ("down", "up"))
            merged[path] = _with_adapter(merged[path], down, up, factor)
    return merged


def _with_adapter(kernel: Lazy, down: Lazy, up: Lazy, factor: float) -> Lazy:
    """Adds the product of down [*inputs, rank] and up [rank, *outputs] to a kernel [*inputs, *outputs]."""
    inputs = len(down.shape) - 1

    def compute(index: Index) -> np.ndarray:
        added = np.tensordot(down.read(index[:inputs]), up.read((slice(None), *index[inputs:])), 1)
        return kernel.read(index) + np.float32(factor) * added

    return Lazy(kernel.shape, compute)
