"""A plan as text: tables for a terminal, and the lines that a run begins with."""

from collections.abc import Sequence
from typing import Any

UNKNOWN = "unknown"
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header, rows


def tables(plan: dict[str, Any]) -> list[Table]:
    """Returns what `plan` returned as tables: a summary, memory, time, collectives and, of a search, the layouts."""
    results = [_summary(plan), _memory(plan), _time(plan)]
    if plan["collectives"]:
        results.append(_collectives(plan))
    if "ranking" in plan:
        results += [_ranking(plan), _rejected(plan)]
    return [table for table in results if table[1]]


def lines(plan: dict[str, Any]) -> list[str]:
    """Returns a log line for the memory, one for the lower bounds and, if it is known, one for the likely time."""
    uses = ", ".join(f"{name} {bytes_text(size)}" for name, size in plan["memory"].items() if size)
    limit = f" of {bytes_text(plan['device_bytes'])}" if plan["device_bytes"] is not None else ""
    known = [f"{name} {ms_text(bound)}" for name, bound in plan["bounds_ms"].items() if bound is not None]
    bounds = f", which takes at least: {', '.join(known)}" if known else ""
    texts = [
        f"plan: a device needs {bytes_text(plan['peak_bytes'])}{limit}: {uses}",
        f"plan: a step is {_flops_text(plan['flops']['hardware'])} on all devices{bounds}",
    ]
    return texts if plan["step_ms"] is None else [*texts, f"plan: {_time_text(plan)}"]


def bytes_text(size: int | None) -> str:
    """Returns bytes with the largest unit that they fill: '1.50 MiB'."""
    if size is None:
        return UNKNOWN
    for unit, unit_bytes in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= unit_bytes:
            return f"{size / unit_bytes:,.2f} {unit}"
    return f"{size} bytes"


def ms_text(value: float | None) -> str:
    """Returns milliseconds with three digits: '12.5 ms'."""
    return UNKNOWN if value is None else f"{value:,.3g} ms"


def _flops_text(count: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count / 1e6:,.3g} MFLOP"


def _time_text(plan: dict[str, Any]) -> str:
    if plan["step_ms"] is None:
        return f"unknown: no rates of {plan['device_kind']} in {plan['dtype']} are published"
    run = "" if plan["hours"] is None else f", {plan['hours']:,.1f} hours for {plan['steps']:,} steps"
    mfu = "" if plan["mfu"] is None else f", MFU {plan['mfu']:.0%}"
    return f"likely {ms_text(plan['step_ms'])} a step, {plan['images_per_second']:,.0f} images/s{mfu}{run}"


def _summary(plan: dict[str, Any]) -> Table:
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    rows = [
        ("target", f"{plan['target']}, {plan['devices']} x {plan['device_kind']}"),
        ("mesh", f"{mesh}, batch {plan['batch_size']:,}"),
        ("fits", _fits_text(plan)),
    ]
    if plan["step_ms"] is not None:
        rows += [
            ("step", f"{ms_text(plan['step_ms'])}, bound by {plan['binds']}"),
            ("images per second", f"{plan['images_per_second']:,.0f}"),
            ("per host", f"{plan['images_per_second_per_host']:,.0f}"),
            ("MFU", f"{plan['mfu']:.1%}"),
        ]
    else:
        rows.append(("step", _time_text(plan) if plan["fits"] is not False else "unknown, because it does not fit"))
    if plan["hours"] is not None:
        hours = f"{plan['hours']:,.1f} hours, {plan['device_hours']:,.0f} device-hours"
        rows.append(("run", f"{plan['steps']:,} steps, {hours}"))
    elif plan["steps"] is None:
        rows.append(("run", "counted in epochs: give the number of training images with --examples=N"))
    if plan["overrides"]:
        rows.append(("use", " ".join(f"--config.{override}" for override in plan["overrides"])))
    rows.append(("compiled in", f"{plan['compile_seconds']:.0f} s"))
    return ("", ""), rows


def _fits_text(plan: dict[str, Any]) -> str:
    peak, limit = bytes_text(plan["peak_bytes"]), bytes_text(plan["device_bytes"])
    if plan["fits"] is None:
        return f"needs {peak}; the device's memory is not known"
    if plan["fits"]:
        return f"yes: {peak} of {limit}, {bytes_text(plan['headroom_bytes'])} to spare"
    return f"NO: {peak}, {bytes_text(-plan['headroom_bytes'])} more than {limit}"


def _memory(plan: dict[str, Any]) -> Table:
    rows = [(name, f"{size:,}", f"{size / plan['peak_bytes']:.1%}") for name, size in plan["memory"].items()]
    return ("memory of a device", "bytes", "share"), [*rows, ("peak", f"{plan['peak_bytes']:,}", "")]


def _time(plan: dict[str, Any]) -> Table:
    rows = [(name, ms_text(bound), f"{plan['efficiencies'][name]:.0%}") for name, bound in plan["bounds_ms"].items()]
    rows += [(f"  over {link}", ms_text(busy), "") for link, busy in plan["network_ms"].items()]
    rows += [(f"arithmetic of a step, {which}", _flops_text(count), "") for which, count in plan["flops"].items()]
    return ("lower bounds of a step", "at full rate", "assumed share"), rows


def _collectives(plan: dict[str, Any]) -> Table:
    rows = [
        (
            row["kind"],
            " x ".join(row["axes"]) or "-",
            f"{row['bytes']:,}",
            str(row["count"]),
            str(row["exposed"]),
            row["link"] or "-",
            row["crosses"] or "-",
            ms_text(row["ms"]),
        )
        for row in plan["collectives"]
    ]
    return ("collective", "over", "bytes", "count per step", "exposed", "link", "crosses", "time per step"), rows


def _ranking(plan: dict[str, Any]) -> Table:
    rows = [
        (
            ms_text(row["step_ms"]),
            "-" if row["compiled_step_ms"] is None else ms_text(row["compiled_step_ms"]),
            bytes_text(row["peak_bytes"]),
            " ".join(row["overrides"]) or "the config's own",
            row["note"],
        )
        for row in plan["ranking"]
    ]
    return ("step, estimated", "compiled", "memory", "layout", ""), rows


def _rejected(plan: dict[str, Any]) -> Table:
    rows = [(str(row["count"]), row["reason"], row["example"]) for row in plan["fallen"]]
    return ("rejected layouts", "because", "such as"), rows
