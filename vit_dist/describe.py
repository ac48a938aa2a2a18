"""`inspect`: the parameters, layout, arithmetic and memory of a config; what weights are, and what becomes of them."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from vit_dist.config import ConfigError, Init
from vit_dist.data.sets.examples import Source
from vit_dist.data.stream.pixels import augments_on_device
from vit_dist.initial import open_weights, with_own_traits, with_traits
from vit_dist.job import processes
from vit_dist.mesh.layout import bytes_per_device
from vit_dist.program import UNUSED, Program
from vit_dist.recipes import Overrides, Recipe, load_config
from vit_dist.step.state import State
from vit_dist.weights.adapted import adapted

CLASSES = 1000  # assumed where the config leaves it to the data, which is not opened here

_log = logging.getLogger(__name__)


def inspect(config: Recipe, overrides: Overrides = ()) -> dict[str, Any]:
    """Describes a config on the devices that it asks for, without opening data or allocating arrays.

    Args:
      config: a recipe's name or file, or a config; see `load_config`.
      overrides: changes of the config, such as {"mesh.fsdp": 8}.

    Returns:
      parameters (their number), flops_per_image (of a training step), bytes_per_device: {parameters, optimizer, ema},
      mesh, and tensors: a list of {name, shape, dtype, sharding, bytes_per_device}.

    Raises:
      ConfigError: naming the key or file that is wrong.
    """
    settings = load_config(config, overrides)
    processes.start(settings.fake_devices, settings.deadlines)
    settings = with_own_traits(settings)
    if settings.model.num_classes is None:
        _log.warning("model.num_classes is left to the data, which inspect does not open: %d assumed", CLASSES)
    program = Program(settings, classes=CLASSES, steps=settings.total_steps or UNUSED, augment_on_device=True)
    program.check_training_batch()
    with program.in_use():
        state = program.abstract_state()
    trees = {"parameters": state.parameters, "optimizer": state.optimizer, "ema": state.ema}
    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.parameters)),
        "flops_per_image": program.flops_per_step() // program.settings.batch_size,
        "bytes_per_device": {name: bytes_per_device(tree) for name, tree in trees.items()},
        "mesh": dict(program.mesh.shape),
        "tensors": list(tensors(state.parameters)),
    }


def inspect_weights(weights: str | Path, config: Recipe | None = None, overrides: Overrides = ()) -> dict[str, Any]:
    """Describes weights, and what a run that starts from them would do with each tensor.

    Args:
      weights: as for `init.weights`.
      config: of such a run; None: what they are without one.
      overrides: changes of the config.

    Returns:
      family, files, digest, model (keys of `model` that the weights say), data (keys of `data` likewise, or `error`),
      classes (their names, or None), parameters (their number), tensors: a list of {name, shape, dtype, becomes: the
      parameters of ours that are made of it}, and changes, sentences.

    Raises:
      ConfigError: as `train` with these weights.
    """
    settings = load_config(config, overrides) if config is not None else None
    init = dataclasses.replace(settings.init if settings else Init(), weights=str(weights))
    published = open_weights(init, settings.model if settings else None)
    try:
        data = published.description.preprocessing(())
    except ConfigError as error:
        data = {"error": str(error)}
    changes: tuple[str, ...] = ()
    if settings is not None:
        settings = with_traits(dataclasses.replace(settings, init=init), published)
        model = dataclasses.replace(settings.model, num_classes=settings.model.num_classes or CLASSES)
        changes = adapted(published, model, settings.init.head).notes
    stored = [(name, one.shape, one.dtype.name) for name, one in published.origin.tensors.items()]
    if not stored:  # an earlier run of ours
        stored = [(name, one.shape, "float32") for name, one in published.parameters.items()]
    return {
        "family": published.description.family,
        "files": [str(file) for file in published.origin.files],
        "digest": published.origin.digest(),
        "model": dict(published.description.model),
        "data": {key.removeprefix("data."): value for key, value in data.items() if not key.startswith("model.")},
        "classes": None if published.description.classes is None else list(published.description.classes),
        "parameters": sum(math.prod(lazy.shape) for lazy in published.parameters.values()),
        "tensors": [
            {"name": name, "shape": list(shape), "dtype": dtype, "becomes": published.taken.get(name, [])}
            for name, shape, dtype in stored
        ],
        "changes": list(changes),
    }


def tensors(parameters: Any) -> Iterator[dict[str, Any]]:
    """Yields name, shape, dtype, sharding and bytes per device of each array of a tree that knows its shardings."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        yield {
            "name": jax.tree_util.keystr(path, simple=True, separator="/"),
            "shape": list(leaf.shape),
            "dtype": np.dtype(leaf.dtype).name,
            "sharding": [list(a) if isinstance(a, tuple) else a for a in _spec(leaf)],
            "bytes_per_device": bytes_per_device(leaf),
        }


def parameter_table(parameters: Any) -> str:
    """Returns a text with a line for each parameter of a tree."""
    table = Table("parameter", "shape", "sharding", "bytes per device", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for tensor in tensors(parameters):
        shape, split = " x ".join(map(str, tensor["shape"])), spec_text(tensor["sharding"])
        table.add_row(tensor["name"], shape, split, f"{tensor['bytes_per_device']:,}")
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))
    table.add_row("all", f"{count:,}", "", f"{bytes_per_device(parameters):,}")
    console = Console(width=120, force_terminal=False)  # no styles, which are escaped before they are shown
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def run_lines(program: Program, state: State, source: Source, splits: Mapping[str, Source]) -> list[str]:
    """Returns what a run says as it begins: parameters, mesh, length, and where images are augmented."""
    settings = program.settings
    lines = parameter_table(state.parameters).splitlines()
    axes = " x ".join(f"{name}={size}" for name, size in program.mesh.shape.items())
    device = program.mesh.devices.flat[0]
    lines.append(f"mesh {axes}, device {device.device_kind}, processes {jax.process_count()}")
    if device.platform == "cpu" and settings.model.dtype == "bfloat16":
        _log.warning("model.dtype: bfloat16 may take longer than float32 on a CPU; compare by bench")
    lines.append(f"{len(source):,} examples, {program.steps:,} steps of {settings.batch_size}")
    if settings.data.crop_area is not None or settings.data.flip:
        where = "device" if augments_on_device(source, settings.data) else "host"
        lines.append(f"crop and flip on the {where} (data.augment_on={settings.data.augment_on})")
    if settings.checkpoint.keep_best and not splits:
        lines.append("nothing is evaluated, so checkpoint.keep_best has no effect: only the newest are kept")
    if int(state.step):
        lines.append(f"resuming from step {int(state.step)}")
    return lines


def spec_text(axes: list[Any]) -> str:
    """Returns the mesh axes that split each dimension of an array, such as `fsdp, -`; `replicated` if none does."""
    names = ["x".join(axis) if isinstance(axis, list) else axis or "-" for axis in axes]
    return ", ".join(names) if any(axes) else "replicated"


def _spec(leaf: Any) -> tuple[Any, ...]:
    sharding = leaf.sharding
    return tuple(sharding.spec) if sharding is not None else ()
