"""`plan`: what a config would need, and how fast it would be, on hardware that is not here."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from vit_dist import config, recipes
from vit_dist.config import Config, ConfigError
from vit_dist.describe import CLASSES
from vit_dist.job import processes
from vit_dist.mesh import layout, topology
from vit_dist.plan import targets
from vit_dist.plan.account import account, account_of_too_large, of_run
from vit_dist.plan.compile import TooLarge, compile_step, make_program
from vit_dist.plan.estimate.search import search as search_layouts
from vit_dist.plan.largest import largest_multiple
from vit_dist.plan.targets import Target
from vit_dist.recipes import Overrides, Recipe, load_config
from vit_dist.schema import flatten

_log = logging.getLogger(__name__)
Account = dict[str, Any]


def plan(
    config: Recipe,
    target: str,
    overrides: Overrides = (),
    *,
    slices: int = 1,
    search: bool = False,
    largest_batch: bool = False,
    examples: int | None = None,
) -> Account:
    """Compiles the training step of a config for a target, such as `v5e:16x16`, and says what it would be like there.

    slices: of a TPU, joined by the data-centre network. search: plans the quickest layout that fits, not the config's
    own. largest_batch: plans the largest batch that fits. examples: how many the data have, for the length of a run in
    epochs; no data are opened.

    Returns what `account` does, and target, device_kind, devices, mesh, batch_size, dtype, overrides (what differs from
    the config), images_per_second_per_host, steps, hours, device_hours (None where the length of the run or the chip's
    rates are not known); with `search` also its ranking, fallen and smallest, which is what is planned where nothing
    fits. What is too large is an answer: `fits` is False. Raises `ConfigError`. The process is then one for planning:
    jax is left with CPU devices alone and, unless the target is one, without its cache of compiled programs.
    """
    settings = load_config(config, overrides)
    if search and largest_batch:
        raise ConfigError("--search: looks for layouts at one batch size; ask for --batch-size=max by itself")
    where = targets.parse(target, slices)
    devices = _devices(where)
    if settings.model.num_classes is None:
        _log.warning("model.num_classes is left to the data, which plan does not open: %d assumed", CLASSES)
    made: dict[Config, Account] = {}

    def account_of(asked: Config) -> Account:
        if asked not in made:
            made[asked] = _compiled_account(asked, where, devices)
            what = ", ".join(changed_keys(settings, asked)) or "the config"
            _log.info("%s: %.0f s to compile", what, made[asked]["compile_seconds"])
        return made[asked]

    chosen, found = settings, {}
    if largest_batch:
        chosen = _with_largest_batch(settings, where, devices, account_of)
    if search:
        found = search_layouts(settings, where, devices, account_of)
        best = found.pop("choice") or found["smallest"]
        if best is None:
            raise ConfigError(
                f"--search: no mesh of {where.name} goes with this config; {found['fallen'][0]['example']}"
            )
        chosen = overridden(settings, best["overrides"])
    hosts = len({device.process_index for device in devices})
    made_of = account_of(chosen)
    return {
        "target": where.name,
        "device_kind": where.chip.kind,
        "devices": where.count,
        "batch_size": chosen.batch_size,
        "dtype": chosen.model.dtype,
        "overrides": changed_keys(settings, chosen),
        **made_of,
        **of_run(chosen, made_of, where.count, hosts, examples),
        **found,
    }


def changed_keys(settings: Config, changed: Config) -> list[str]:
    """What turns one config into the other, as `key=value`."""
    flat = flatten(config.to_dict(changed))
    return [recipes.assignment(key, flat[key]) for key in config.differences(settings, changed)]


def overridden(settings: Config, assignments: Sequence[str]) -> Config:
    """The config with `key=value` assignments."""
    return config.resolve(recipes.override(config.to_dict(settings), assignments))


def _devices(where: Target) -> list[jax.Device]:
    """The target's devices. What is here is a CPU alone: accelerators, if there are any, are left to who uses them."""
    count = where.count if where.chip.platform == "cpu" else 1
    if where.chip.platform != "cpu":
        jax.config.update("jax_enable_compilation_cache", False)  # jax can keep what it cannot run, but not read it
    with contextlib.suppress(ConfigError):  # jax runs already, perhaps with as many as are needed
        processes.make_fake_devices(count)
    return targets.devices(where)


def _compiled_account(settings: Config, where: Target, devices: Sequence[jax.Device]) -> Account:
    program = make_program(settings, devices)
    begun = time.perf_counter()
    try:
        found = account(compile_step(program), where.chip)
    except TooLarge as error:
        found = account_of_too_large(program, error, where.chip)
    except ConfigError:  # a ValueError too, and says what is wrong already
        raise
    except ValueError as error:
        raise ConfigError(f"--target={where.name}: the compiled program cannot be read: {error}") from error
    return {"mesh": dict(program.mesh.shape), **found, "compile_seconds": round(time.perf_counter() - begun, 1)}


def _with_largest_batch(
    settings: Config, where: Target, devices: Sequence[jax.Device], account_of: Callable[[Config], Account]
) -> Config:
    """The config with the largest batch that fits. Raises `ConfigError` where none does."""
    limit = where.chip.memory_bytes
    if limit is None:
        raise ConfigError(f"--batch-size=max: the memory of {where.chip.name} is not known")
    sizes = topology.axis_sizes(settings.mesh, len(devices))
    unit = settings.accumulate_steps * math.prod(sizes[axis] for axis in layout.TABLE["batch"])

    def of_size(multiple: int) -> Config:
        return dataclasses.replace(settings, batch_size=unit * multiple)

    multiple = largest_multiple(lambda multiple: account_of(of_size(multiple))["peak_bytes"], limit)
    if multiple == 0:
        short = account_of(of_size(1))["peak_bytes"] - limit
        raise ConfigError(
            f"--batch-size=max: even a batch of {unit}, the smallest of this mesh, needs {short:,} bytes more than a "
            f"device has; try --search"
        )
    return of_size(multiple)
