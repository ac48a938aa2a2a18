"""A plan as text: tables for a terminal, and the lines that a run begins with."""

from collections.abc import Sequence
from typing import Any

UNKNOWN = "unknown"
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header, rows


def tables(plan: dict[str, Any]) -> list[Table]:
    """What `plan` returned, a table a question: does it fit, how fast is it, who communicates, what else is there."""
    found = [_summary(plan), _memory(plan), _time(plan)]
    if plan["collectives"]:
        found.append(_collectives(plan))
    if "ranking" in plan:
        found += [_ranking(plan), _fallen(plan)]
    return [table for table in found if table[1]]


def lines(plan: dict[str, Any]) -> list[str]:
    """Memory, bounds and, where it is known, the time that follows: a line each."""
    parts = ", ".join(f"{name} {gib(size)}" for name, size in plan["memory"].items() if size)
    of = f" of {gib(plan['device_bytes'])}" if plan["device_bytes"] is not None else ""
    known = [f"{name} {say_ms(bound)}" for name, bound in plan["bounds_ms"].items() if bound is not None]
    least = f", which takes at least: {', '.join(known)}" if known else ""
    found = [
        f"plan: a device needs {gib(plan['peak_bytes'])}{of}: {parts}",
        f"plan: a step is {_say_flops(plan['flops']['hardware'])} on all devices{least}",
    ]
    return found if plan["step_ms"] is None else [*found, f"plan: {_likely(plan)}"]


def gib(size: int) -> str:
    """Bytes as a person reads them."""
    for unit, bytes_of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= bytes_of:
            return f"{size / bytes_of:,.2f} {unit}"
    return f"{size} bytes"


def say_ms(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.3g} ms"


def _say_flops(count: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count / 1e6:,.3g} MFLOP"


def _likely(plan: dict[str, Any]) -> str:
    if plan["step_ms"] is None:
        return f"no time is planned: what {plan['device_kind']} can do in {plan['dtype']} is not published"
    run = "" if plan["hours"] is None else f", {plan['hours']:,.1f} hours for {plan['steps']:,} steps"
    mfu = "" if plan["mfu"] is None else f", MFU {plan['mfu']:.0%}"
    return f"likely {say_ms(plan['step_ms'])} a step, {plan['images_per_second']:,.0f} images/s{mfu}{run}"


def _summary(plan: dict[str, Any]) -> Table:
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    rows = [
        ("target", f"{plan['target']}, {plan['devices']} x {plan['device_kind']}"),
        ("mesh", f"{mesh}, batch {plan['batch_size']:,}"),
        ("fits", _fits(plan)),
    ]
    if plan["step_ms"] is not None:
        rows += [
            ("step", f"{say_ms(plan['step_ms'])}, bound by {plan['binds']}"),
            ("images a second", f"{plan['images_per_second']:,.0f}, a host {plan['images_per_second_per_host']:,.0f}"),
            ("MFU", f"{plan['mfu']:.1%}"),
        ]
    else:
        rows.append(("step", _likely(plan) if plan["fits"] is not False else "not known of what does not fit"))
    if plan["hours"] is not None:
        rows.append(
            ("run", f"{plan['steps']:,} steps, {plan['hours']:,.1f} hours, {plan['device_hours']:,.0f} of devices")
        )
    elif plan["steps"] is None:
        rows.append(("run", "counted in epochs: --examples=N says how many images the data have"))
    if plan["overrides"]:
        rows.append(("use", " ".join(f"--config.{one}" for one in plan["overrides"])))
    rows.append(("compiled in", f"{plan['compile_seconds']:.0f} s"))
    return ("", ""), rows


def _fits(plan: dict[str, Any]) -> str:
    if plan["fits"] is None:
        return f"needs {gib(plan['peak_bytes'])}; the device's memory is not known"
    if plan["fits"]:
        return f"yes: {gib(plan['peak_bytes'])} of {gib(plan['device_bytes'])}, {gib(plan['headroom_bytes'])} to spare"
    return f"NO: {gib(plan['peak_bytes'])}, {gib(-plan['headroom_bytes'])} more than {gib(plan['device_bytes'])}"


def _memory(plan: dict[str, Any]) -> Table:
    rows = [(name, f"{size:,}", f"{size / plan['peak_bytes']:.1%}") for name, size in plan["memory"].items()]
    return ("memory of a device", "bytes", "share"), [*rows, ("peak", f"{plan['peak_bytes']:,}", "")]


def _time(plan: dict[str, Any]) -> Table:
    rows = [(name, say_ms(bound), f"{plan['efficiencies'][name]:.0%}") for name, bound in plan["bounds_ms"].items()]
    rows += [(f"  over {link}", say_ms(busy), "") for link, busy in plan["network_ms"].items()]
    rows += [(f"arithmetic of a step, {which}", _say_flops(count), "") for which, count in plan["flops"].items()]
    return ("lower bounds of a step", "at full rate", "reached"), rows


def _collectives(plan: dict[str, Any]) -> Table:
    rows = [
        (
            one["kind"],
            " x ".join(one["axes"]) or "-",
            f"{one['bytes']:,}",
            str(one["count"]),
            one["link"] or "-",
            one["crosses"] or "-",
            say_ms(one["ms"]),
        )
        for one in plan["collectives"]
    ]
    return ("collective", "over", "bytes", "times a step", "by", "crosses", "time a step"), rows


def _ranking(plan: dict[str, Any]) -> Table:
    rows = [
        (
            say_ms(one["step_ms"]),
            "-" if one["compiled_step_ms"] is None else say_ms(one["compiled_step_ms"]),
            gib(one["peak_bytes"]),
            " ".join(one["overrides"]) or "as it is",
            one["note"],
        )
        for one in plan["ranking"]
    ]
    return ("step, estimated", "compiled", "memory", "layout", ""), rows


def _fallen(plan: dict[str, Any]) -> Table:
    rows = [(str(one["count"]), one["reason"], one["example"]) for one in plan["fallen"]]
    return ("layouts that fall", "because", "such as"), rows
