"""`plan`: the memory and time of a config's training step on hardware that need not be attached."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence

import jax

from vit_dist import config, recipes
from vit_dist.config import Config, ConfigError
from vit_dist.describe import CLASSES
from vit_dist.initial import with_own_traits
from vit_dist.job import processes
from vit_dist.mesh import layout, topology
from vit_dist.plan import targets
from vit_dist.plan.analysis import Analysis, run_fields, step_analysis, too_large_analysis
from vit_dist.plan.compile import TooLarge, compile_step, make_program
from vit_dist.plan.estimate.search import search as search_layouts
from vit_dist.plan.largest import largest_multiple
from vit_dist.plan.targets import Target
from vit_dist.program import decided
from vit_dist.recipes import Overrides, Recipe, load_config
from vit_dist.schema import flatten

_log = logging.getLogger(__name__)


def plan(
    config: Recipe,
    target: str,
    overrides: Overrides = (),
    *,
    slices: int = 1,
    search: bool = False,
    largest_batch: bool = False,
    examples: int | None = None,
) -> Analysis:
    """Compiles the training step of a config for a target and returns its memory, time and collectives.

    Afterwards this process can only plan: jax then has CPU devices only and, unless the target is a CPU, no compilation
    cache.

    Args:
      config: a recipe's name or path, or a config.
      target: the hardware, such as `v5e:16x16` (`plan.targets`).
      overrides: changes of the config.
      slices: number of TPU slices, connected by the data-centre network.
      search: plan the fastest layout that fits instead of the config's own.
      largest_batch: plan the largest batch that fits.
      examples: number of training examples, for the length of a run counted in epochs; no data are opened.

    Returns:
      What `step_analysis` returns, and target, device_kind, devices, mesh, batch_size, dtype, overrides (differences
      from the config), images_per_second_per_host, steps, hours, device_hours (None if the length of the run or the
      chip's rates are unknown). With `search` also `ranking`, `fallen` (rejected layouts) and `smallest` (the
      layout of the least memory, which is planned if no layout fits). A step that is too large is a result, not an
      error: `fits` is False.

    Raises:
      ConfigError: the config, the target or both together are not valid, or a compiler is not installed.
    """
    settings = load_config(config, overrides)
    if search and largest_batch:
        raise ConfigError("--search: looks for layouts at one batch size; give it or --batch-size=max, not both")
    hardware = targets.parse(target, slices)
    devices, chip = _devices(hardware), hardware.chip
    settings = with_own_traits(settings)
    given, settings = settings, decided(settings, chip.platform, chip.kind, len(devices), chip.memory_bytes)
    if settings.model.num_classes is None:
        _log.warning("model.num_classes is left to the data, which plan does not open: %d assumed", CLASSES)
    analyses: dict[Config, Analysis] = {}

    def analyse(candidate: Config) -> Analysis:
        if candidate not in analyses:
            analyses[candidate] = _compiled_analysis(candidate, hardware, devices)
            changes = ", ".join(changed_keys(settings, candidate)) or "the config"
            _log.info("%s: %.0f s to compile", changes, analyses[candidate]["compile_seconds"])
        return analyses[candidate]

    chosen, search_results = settings, {}
    if largest_batch:
        chosen = _with_largest_batch(settings, hardware, devices, analyse)
    if search:
        search_results = search_layouts(settings, hardware, devices, analyse)
        best = search_results.pop("choice") or search_results["smallest"]
        if best is None:
            example = search_results["fallen"][0]["example"]
            raise ConfigError(f"--search: this config is valid on no mesh of {hardware.name}; {example}")
        chosen = overridden(settings, best["overrides"])
        for row in (*search_results["ranking"], search_results["smallest"]):
            row["overrides"] = changed_keys(given, overridden(settings, row["overrides"]))
    hosts = len({device.process_index for device in devices})
    analysis = analyse(chosen)
    return {
        "target": hardware.name,
        "device_kind": hardware.chip.kind,
        "devices": hardware.count,
        "batch_size": chosen.batch_size,
        "dtype": chosen.model.dtype,
        # A layout that was searched for leaves nothing to be decided anew by `train`.
        "overrides": changed_keys(given if search or largest_batch else settings, chosen),
        **analysis,
        **run_fields(chosen, analysis, hardware.count, hosts, examples),
        **search_results,
    }


def changed_keys(settings: Config, changed: Config) -> list[str]:
    """Returns the `key=value` assignments that turn one config into the other."""
    flat = flatten(config.to_dict(changed))
    return [recipes.assignment(key, flat[key]) for key in config.differences(settings, changed)]


def overridden(settings: Config, assignments: Sequence[str]) -> Config:
    """Returns the config with these `key=value` assignments applied."""
    return config.resolve(recipes.override(config.to_dict(settings), assignments))


def _devices(target: Target) -> list[jax.Device]:
    """Returns the target's devices. jax gets CPU devices only, so that accelerators stay free for other processes."""
    count = target.count if target.chip.platform == "cpu" else 1
    if target.chip.platform != "cpu":
        # jax writes programs for devices that are not attached to its cache, but cannot read them back.
        jax.config.update("jax_enable_compilation_cache", False)
    with contextlib.suppress(ConfigError):  # jax runs already, perhaps with enough devices
        processes.make_fake_devices(count)
    return targets.devices(target)


def _compiled_analysis(settings: Config, target: Target, devices: Sequence[jax.Device]) -> Analysis:
    program = make_program(settings, devices)
    start = time.perf_counter()
    try:
        analysis = step_analysis(compile_step(program), target.chip)
    except TooLarge as error:
        analysis = too_large_analysis(program, error, target.chip)
    except ConfigError:  # a subclass of ValueError, whose message is complete
        raise
    except ValueError as error:
        raise ConfigError(f"--target={target.name}: the compiled program cannot be read: {error}") from error
    return {"mesh": dict(program.mesh.shape), **analysis, "compile_seconds": round(time.perf_counter() - start, 1)}


def _with_largest_batch(
    settings: Config, target: Target, devices: Sequence[jax.Device], analyse: Callable[[Config], Analysis]
) -> Config:
    """Returns the config with the largest batch that fits. Raises `ConfigError` if none does."""
    limit = target.chip.memory_bytes
    if limit is None:
        raise ConfigError(f"--batch-size=max: the memory of {target.chip.name} is not known")
    sizes = topology.axis_sizes(settings.mesh, len(devices))
    unit = settings.accumulate_steps * math.prod(sizes[axis] for axis in layout.TABLE["batch"])

    def with_batch(multiple: int) -> Config:
        return dataclasses.replace(settings, batch_size=unit * multiple)

    multiple = largest_multiple(lambda multiple: analyse(with_batch(multiple))["peak_bytes"], limit)
    if multiple == 0:
        missing = analyse(with_batch(1))["peak_bytes"] - limit
        raise ConfigError(
            f"--batch-size=max: even a batch of {unit}, the smallest of this mesh, needs {missing:,} bytes more than a "
            f"device has; try --search"
        )
    return with_batch(multiple)
