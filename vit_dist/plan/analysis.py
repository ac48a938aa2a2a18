"""Analyses a compiled step for one device: its memory, its collectives, lower bounds on its time, its likely time.

An analysis is a dict of plain values: part of what `plan` returns, and of its JSON.
"""

import dataclasses
from collections import Counter
from typing import Any

from vit_dist import lengths
from vit_dist.config import Config
from vit_dist.model import flops
from vit_dist.plan import links, roofline
from vit_dist.plan.arithmetic import attention_implementation, device_flops
from vit_dist.plan.collectives import Collective, collectives
from vit_dist.plan.compile import CompiledStep, TooLarge
from vit_dist.plan.overlap import exposed
from vit_dist.plan.roofline import EFFICIENCY, Cost, Transfer
from vit_dist.plan.targets import Chip
from vit_dist.plan.traffic import traffic
from vit_dist.program import Program

Analysis = dict[str, Any]


def step_analysis(step: CompiledStep, chip: Chip) -> Analysis:
    """Returns the analysis of a step that was compiled for devices of this kind.

    Args:
      step: the compiled step.
      chip: the kind of device.

    Returns:
      - fits, peak_bytes, device_bytes, headroom_bytes: whether a device's memory suffices.
      - memory: bytes by use, whose sum is peak_bytes.
      - flops: {model, hardware}, of a step over all devices.
      - collectives: {kind, axes, bytes, count, exposed, link, crosses, ms} of each; `exposed` of the `count` have no
        matrix product to hide behind.
      - traffic: {product_bytes, other_bytes, kernels} of one device in a step (`plan.traffic`), None if unknown.
      - bounds_ms: lower bounds on a step {arithmetic, memory, network}; binds: the name of the largest.
      - network_ms: milliseconds that each link is busy; efficiencies: assumed shares of the full rates.
      - step_ms, images_per_second, mfu: of the likely step. Times are None where the chip's rates are unknown.

    Raises:
      ValueError: the compiled program cannot be read.
    """
    program, text = step.program, step.executable.as_text()
    assert text is not None
    sizes = dict(program.mesh.shape)
    step_collectives, moved = collectives(text, sizes), traffic(text)
    attention = attention_implementation(program.settings, chip, sizes)
    transfers = (_transfer(collective, program, chip) for collective in step_collectives)
    cost = Cost(
        flops=device_flops(program.settings, attention, sizes),
        bytes=moved.product_bytes + moved.other_bytes,
        other_bytes=moved.other_bytes,
        transfers=tuple(transfer for transfer in transfers if transfer is not None),
    )
    return {
        **_memory_fields(memory_by_use(step, chip), chip),
        **_time_fields(program, cost, chip),
        "traffic": dataclasses.asdict(moved),
        "collectives": _collective_rows(step_collectives, exposed(text, sizes), program, chip),
    }


def analysis_without_time(step: CompiledStep, chip: Chip) -> Analysis:
    """Returns the analysis of a step whose program cannot be read, or whose chip has unknown rates."""
    return {**_memory_fields(memory_by_use(step, chip), chip), **_arithmetic_fields(step.program, chip)}


def too_large_analysis(program: Program, error: TooLarge, chip: Chip) -> Analysis:
    """Returns the analysis of a step that the compiler could not fit: its only figure is the memory needed, rounded."""
    needed = max(error.needed, (chip.memory_bytes or 0) + 1)
    uses = {**error.held, "temporaries": needed - sum(error.held.values())}
    return {**_memory_fields(uses, chip), **_arithmetic_fields(program, chip)}


def memory_by_use(step: CompiledStep, chip: Chip) -> dict[str, int]:
    """Returns the bytes that a device holds at the peak of a step, by use.

    The sum is what the compiler reports (arguments, temporaries, code, results that do not reuse an argument's buffer)
    and the arguments that the step does not use: the compiler leaves these out, but the device holds them.
    """
    compiled = step.executable.memory_analysis()
    assert compiled is not None
    uses = {
        **step.held,
        "padding": max(compiled.argument_size_in_bytes - sum(step.held.values()), 0),  # of the arrays' memory layout
        "temporaries": compiled.temp_size_in_bytes + compiled.output_size_in_bytes - compiled.alias_size_in_bytes,
        "code": compiled.generated_code_size_in_bytes,
    }
    if chip.platform == "tpu" and chip.memory_bytes is not None:
        # The TPU compiler refuses programs that do not fit; a larger sum contains unused gaps between buffers.
        uses["temporaries"] -= min(max(sum(uses.values()) - chip.memory_bytes, 0), uses["temporaries"])
    return uses


def run_fields(settings: Config, step: Analysis, devices: int, hosts: int, examples: int | None) -> Analysis:
    """Returns what a step's analysis means for the complete run.

    Args:
      settings: the config, for the length of the run.
      step: the step's `step_ms` and `images_per_second`, both None if unknown.
      devices: number of devices.
      hosts: number of hosts that read data.
      examples: number of training examples, for a run counted in epochs; None if it is unknown.

    Returns:
      images_per_second_per_host, steps, hours, device_hours; None where unknown.
    """
    known = settings.total_steps is not None or examples is not None
    steps = lengths.total_steps(settings, examples or 0) if known else None
    hours = None if steps is None or step["step_ms"] is None else steps * step["step_ms"] / 3_600_000
    rate = step["images_per_second"]
    return {
        "images_per_second_per_host": None if rate is None else rate / hosts,
        "steps": steps,
        "hours": hours,
        "device_hours": None if hours is None else hours * devices,
    }


def _memory_fields(uses: dict[str, int], chip: Chip) -> Analysis:
    peak = sum(uses.values())
    return {
        "fits": None if chip.memory_bytes is None else peak <= chip.memory_bytes,
        "peak_bytes": peak,
        "device_bytes": chip.memory_bytes,
        "headroom_bytes": None if chip.memory_bytes is None else chip.memory_bytes - peak,
        "memory": uses,
    }


def _time_fields(program: Program, cost: Cost, chip: Chip) -> Analysis:
    settings, dtype = program.settings, program.settings.model.dtype
    attention = attention_implementation(settings, chip, dict(program.mesh.shape))
    bounds, seconds = roofline.bounds_ms(cost, chip, dtype), roofline.step_seconds(cost, chip, dtype)
    peak = chip.peak_flops(dtype)
    known = {name: bound for name, bound in bounds.items() if bound is not None}
    return {
        "flops": {
            "model": program.flops_per_step(),
            "hardware": flops.hardware_flops(settings.model, attention) * settings.batch_size,
        },
        "bounds_ms": bounds,
        "binds": max(known, key=lambda name: known[name]) if known else None,
        "network_ms": roofline.network_ms(cost.transfers),
        "efficiencies": EFFICIENCY,
        "step_ms": None if seconds is None else seconds * 1000,
        "images_per_second": None if seconds is None else settings.batch_size / seconds,
        "mfu": None if seconds is None or not peak else program.flops_per_step() / (seconds * peak * program.mesh.size),
    }


def _arithmetic_fields(program: Program, chip: Chip) -> Analysis:
    """Returns the fields beside memory for a step of which only the arithmetic is known."""
    sizes = dict(program.mesh.shape)
    attention = attention_implementation(program.settings, chip, sizes)
    cost = Cost(device_flops(program.settings, attention, sizes), 0, 0)
    arithmetic = roofline.bounds_ms(cost, chip, program.settings.model.dtype)["arithmetic"]
    return {
        **_time_fields(program, cost, chip),
        "bounds_ms": {"arithmetic": arithmetic, "memory": None, "network": None},
        **dict.fromkeys(("binds", "step_ms", "images_per_second", "mfu")),
        "traffic": None,
        "collectives": [],
    }


def _transfer(collective: Collective, program: Program, chip: Chip) -> Transfer | None:
    members, settings = links.group(program.mesh, collective.axes), program.settings
    link = links.slowest_link(chip, members)
    return roofline.transfer(collective, len(members), link, settings.model, settings.accumulate_steps)


def _collective_rows(
    step_collectives: list[Collective], not_hidden: list[Collective], program: Program, chip: Chip
) -> list[dict[str, Any]]:
    """Returns a row for all collectives of the same kind, axes and bytes, those that move most first."""
    alike: dict[tuple[Any, ...], list[Collective]] = {}
    for collective in step_collectives:
        alike.setdefault(_row_key(collective), []).append(collective)
    exposed_counts: Counter[tuple[Any, ...]] = Counter()
    for collective in not_hidden:
        exposed_counts[_row_key(collective)] += collective.count
    rows = [_collective_row(group, exposed_counts[key], program, chip) for key, group in alike.items()]
    return sorted(rows, key=lambda row: -row["bytes"] * row["count"])


def _row_key(collective: Collective) -> tuple[Any, ...]:
    return collective.kind, collective.axes, collective.bytes


def _collective_row(alike: list[Collective], exposed_count: int, program: Program, chip: Chip) -> dict[str, Any]:
    first, members = alike[0], links.group(program.mesh, alike[0].axes)
    link = links.slowest_link(chip, members)
    transfers = (_transfer(collective, program, chip) for collective in alike)
    milliseconds = sum(transfer.seconds for transfer in transfers if transfer is not None) * 1000
    return {
        "kind": first.kind,
        "axes": list(first.axes),
        "bytes": first.bytes,
        "count": sum(collective.count for collective in alike),
        "exposed": exposed_count,
        "link": link.name or None,
        "crosses": links.crosses(members),
        "ms": None if link.bandwidth is None else milliseconds,
    }
