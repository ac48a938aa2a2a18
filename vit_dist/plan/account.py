"""A compiled step, for one device: its memory and collectives, bounds on its time, and the time that is likely."""

from typing import Any

from vit_dist import config
from vit_dist.config import Config
from vit_dist.model import flops
from vit_dist.plan import links, roofline
from vit_dist.plan.arithmetic import attention_of, device_flops
from vit_dist.plan.collectives import Collective, collectives
from vit_dist.plan.compile import Step, TooLarge
from vit_dist.plan.roofline import EFFICIENCY, Cost, Transfer
from vit_dist.plan.targets import Chip
from vit_dist.plan.traffic import traffic
from vit_dist.program import Program


def account(step: Step, chip: Chip) -> dict[str, Any]:
    """The account of a step compiled for devices of this kind, as plain values.

    fits, peak_bytes, device_bytes, headroom_bytes: of a device's memory. memory: bytes by what they are for, which sum
    to peak_bytes. flops: {model, hardware} of a step over all devices. collectives: a list of {kind, axes, bytes,
    count, link, crosses, ms}. bounds_ms, binds, network_ms, efficiencies, step_ms, images_per_second, mfu: see
    `roofline`; None where the chip's rates are not known. Raises `ValueError` for a program that cannot be read.
    """
    program, text = step.program, step.executable.as_text()
    assert text is not None
    sizes = dict(program.mesh.shape)
    found, moved = collectives(text, sizes), traffic(text)
    attention = attention_of(program.settings, chip.platform, sizes)
    work = Cost(
        flops=device_flops(program.settings, attention, sizes),
        bytes=moved.product_bytes + moved.other_bytes,
        other_bytes=moved.other_bytes,
        transfers=tuple(said for one in found if (said := _talk(one, program, chip)) is not None),
    )
    return {
        **of_memory(memory(step, chip), chip),
        **of_time(program, work, chip),
        "collectives": _rows(found, program, chip),
    }


def account_without_time(step: Step, chip: Chip) -> dict[str, Any]:
    """The account of a step where the chip's rates are not known or its program cannot be read."""
    return {**of_memory(memory(step, chip), chip), **_of_arithmetic(step.program, chip)}


def account_of_too_large(program: Program, error: TooLarge, chip: Chip) -> dict[str, Any]:
    """The account of a step that the compiler gave up: it says only how much memory that would take, rounded."""
    needed = max(error.needed, (chip.memory_bytes or 0) + 1)
    uses = {**error.held, "temporaries": needed - sum(error.held.values())}
    return {**of_memory(uses, chip), **_of_arithmetic(program, chip)}


def memory(step: Step, chip: Chip) -> dict[str, int]:
    """Bytes that a device holds at the worst moment of a step, by what they are for.

    The compiler's own sum: arguments, temporaries, code, and results that take no argument's place. An argument that
    the step does not use is held all the same.
    """
    of = step.executable.memory_analysis()
    assert of is not None
    parts = {
        **step.held,
        "padding": max(of.argument_size_in_bytes - sum(step.held.values()), 0),  # of arrays' layout in memory
        "temporaries": of.temp_size_in_bytes + of.output_size_in_bytes - of.alias_size_in_bytes,
        "code": of.generated_code_size_in_bytes,
    }
    if chip.platform == "tpu" and chip.memory_bytes is not None:
        # TPUs' compiler makes nothing that does not fit: where the sum says otherwise, there are holes in it.
        parts["temporaries"] -= min(max(sum(parts.values()) - chip.memory_bytes, 0), parts["temporaries"])
    return parts


def of_memory(parts: dict[str, int], chip: Chip) -> dict[str, Any]:
    """Whether so much fits into the chip's memory, and what is left of it."""
    peak = sum(parts.values())
    return {
        "fits": None if chip.memory_bytes is None else peak <= chip.memory_bytes,
        "peak_bytes": peak,
        "device_bytes": chip.memory_bytes,
        "headroom_bytes": None if chip.memory_bytes is None else chip.memory_bytes - peak,
        "memory": parts,
    }


def of_time(program: Program, work: Cost, chip: Chip) -> dict[str, Any]:
    """The arithmetic of a step and the time that its work takes on the chip."""
    settings, dtype = program.settings, program.settings.model.dtype
    attention = attention_of(settings, chip.platform, dict(program.mesh.shape))
    bounds, seconds = roofline.bounds_ms(work, chip, dtype), roofline.step_seconds(work, chip, dtype)
    peak = chip.peak_flops(dtype)
    known = {name: bound for name, bound in bounds.items() if bound is not None}
    return {
        "flops": {
            "model": program.flops_per_step(),
            "hardware": flops.hardware_flops(settings.model, attention) * settings.batch_size,
        },
        "bounds_ms": bounds,
        "binds": max(known, key=lambda name: known[name]) if known else None,
        "network_ms": roofline.network_ms(work.transfers),
        "efficiencies": EFFICIENCY,
        "step_ms": None if seconds is None else seconds * 1000,
        "images_per_second": None if seconds is None else settings.batch_size / seconds,
        "mfu": None if seconds is None or not peak else program.flops_per_step() / (seconds * peak * program.mesh.size),
    }


def _of_arithmetic(program: Program, chip: Chip) -> dict[str, Any]:
    """What `account` returns beside memory, of a step of which only the arithmetic is known."""
    sizes = dict(program.mesh.shape)
    attention = attention_of(program.settings, chip.platform, sizes)
    least = Cost(device_flops(program.settings, attention, sizes), 0, 0)
    arithmetic = roofline.bounds_ms(least, chip, program.settings.model.dtype)["arithmetic"]
    return {
        **of_time(program, least, chip),
        "bounds_ms": {"arithmetic": arithmetic, "memory": None, "network": None},
        **dict.fromkeys(("binds", "step_ms", "images_per_second", "mfu")),
        "collectives": [],
    }


def of_run(settings: Config, step: dict[str, Any], devices: int, hosts: int, examples: int | None) -> dict[str, Any]:
    """What follows for the whole run: steps, hours, device_hours; and what each host has to feed its devices."""
    known = settings.total_steps is not None or examples is not None
    steps = config.total_steps(settings, examples or 0) if known else None
    hours = None if steps is None or step["step_ms"] is None else steps * step["step_ms"] / 3_600_000
    rate = step["images_per_second"]
    return {
        "images_per_second_per_host": None if rate is None else rate / hosts,
        "steps": steps,
        "hours": hours,
        "device_hours": None if hours is None else hours * devices,
    }


def _talk(one: Collective, program: Program, chip: Chip) -> Transfer | None:
    members, settings = links.group(program.mesh, one.axes), program.settings
    wire = links.link(chip, members)
    return roofline.transfer(one, len(members), wire, settings.model, settings.accumulate_steps)


def _rows(found: list[Collective], program: Program, chip: Chip) -> list[dict[str, Any]]:
    """The collectives, those that are alike as one, what sends most first."""
    alike: dict[tuple[Any, ...], list[Collective]] = {}
    for one in found:
        alike.setdefault((one.kind, one.axes, one.bytes), []).append(one)
    rows = [_row(several, program, chip) for several in alike.values()]
    return sorted(rows, key=lambda row: -row["bytes"] * row["count"])


def _row(several: list[Collective], program: Program, chip: Chip) -> dict[str, Any]:
    first, members = several[0], links.group(program.mesh, several[0].axes)
    link, rate = links.link(chip, members)
    transfers = (_talk(one, program, chip) for one in several)
    return {
        "kind": first.kind,
        "axes": list(first.axes),
        "bytes": first.bytes,
        "count": sum(one.count for one in several),
        "link": link or None,
        "crosses": links.crosses(members),
        "ms": None if rate is None else sum(talk.seconds for talk in transfers if talk is not None) * 1000,
    }
