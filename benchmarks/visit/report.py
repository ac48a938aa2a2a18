"""The record of a visit as a page in Markdown.

    python -m visit.report visit.json

prints it. Whatever the record lacks, since a part was left out, failed or was killed, the page lacks too.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
_STEPS = ("b16", "s16", "l16", "b16_scan")  # of ours, with timm's beside them as `b16_timm`
_GIB = 2**30
_CELL = 300  # characters at the most


def markdown(record: Record) -> str:
    """The page of a visit, whatever part of it is done."""
    return "\n".join(line for section in _SECTIONS for line in section(record)) + "\n"


def against_plans(record: Record) -> list[dict[str, Any]]:
    """Memory and time of our steps as planned and as measured, a row for each that has both a plan and a result."""
    kind, rows = _result(record, "machine").get("device_kind"), []
    for plans in record.get("plans") or []:
        for name, plan in plans.items():
            found = _result(record, name)
            if plan["device_kind"] != kind or "step_ms" not in found:
                continue
            rows.append(
                {
                    "part": name,
                    "plan": f"{plan['target']}, jax {plan['jax']}",
                    "planned_bytes": plan["peak_bytes"],
                    "compiled_bytes": found["compiled_bytes"],
                    "measured_bytes": found["peak_bytes"],
                    "planned_ms": plan["step_ms"],
                    "measured_ms": statistics.median(found["step_ms"]),
                }
            )
    return rows


def _head(record: Record) -> list[str]:
    machine = _result(record, "machine")
    kind = machine.get("device_kind", "a machine that did not say what it is")
    versions = ", ".join(f"{name} {one}" for name, one in machine.get("versions", {}).items() if one)
    lines = [
        f"# {'A dry run on' if record['dry_run'] else 'A visit to'} {kind}, {record['time'][:10]}",
        "",
        f"{record['seconds']:.0f} s of {record['budget_seconds']:.0f} s.",
        f"Python {machine.get('python')}, {versions}; {machine.get('cores')} cores of {machine.get('processor')}.",
    ]
    if machine.get("nvidia_smi"):
        lines.append(f"The driver says: {machine['nvidia_smi']}.")
    if record.get("cache_was_given"):
        lines.append("Programs compiled by an earlier visit were taken along: compile times are those of finding them.")
    return [*lines, ""]


def _parts(record: Record) -> list[str]:
    rows = []
    for name, part in record["parts"].items():
        seconds = "-" if part.get("seconds") is None else f"{part['seconds']:.0f}"
        rows.append([name, part["status"], seconds, f"{part['expected_seconds']:.0f}", part.get("reason") or ""])
    return _table("", ("part", "status", "s", "expected", "why"), rows)


def _ceilings(record: Record) -> list[str]:
    found, rows = _result(record, "ceilings"), []
    side = found.get("product_side")
    kinds = ("product_tflops", f"bf16 product of {side} x {side}", "TFLOP/s"), ("copy_gbs", "copy in memory", "GB/s")
    for key, what, unit in kinds:
        if rates := found.get(key):
            rows.append([what, f"{rates['median']:,.4g} {unit}", f"{rates['least']:,.4g} to {rates['most']:,.4g}"])
    return _table("What the device can do", ("ceiling", "median", "over the rounds"), rows)


def _steps(record: Record) -> list[str]:
    ceiling, rows = _result(record, "ceilings").get("product_tflops", {}).get("median"), []
    for name in _STEPS:
        ours = _result(record, name)
        for side in (name, f"{name}_timm"):
            found = _result(record, side)
            if "step_ms" in found:
                rows.append(_step_row(side, found, ours, ceiling))
    header = ("step", "batch", "img/s", "ms", "least to most", "x timm", "MFU", "of ceiling", "GiB", "compile s")
    note = (
        "MFU: the arithmetic of three forward passes, as a share of the datasheet's peak; beside it, of the product "
        "that was measured. GiB: the most that jax or PyTorch has held at once. Compile: of timm's, the first step."
    )
    return _table("A training step: bf16, AdamW, one batch in device memory", header, rows, note)


def _step_row(name: str, found: dict[str, Any], ours: dict[str, Any], ceiling: float | None) -> list[str]:
    """ours: our result for the same model and batch, which `found` is or stands beside. ceiling: TFLOP/s."""
    ms, flops, peak = statistics.median(found["step_ms"]), ours.get("flops_per_step"), ours.get("peak_flops")
    rate = flops / (ms / 1000) / 1e12 if flops else None
    compiled = found.get("compile_seconds", found.get("first_step_seconds"))
    return [
        name,
        str(found["batch"]),
        f"{found['images_per_second']:,.0f}",
        f"{ms:,.4g}",
        f"{min(found['step_ms']):,.4g} to {max(found['step_ms']):,.4g}",
        "" if found is ours else _ratio(ours.get("images_per_second"), found["images_per_second"]),
        _percent(rate, peak / 1e12 if peak else None),
        _percent(rate, ceiling),
        _gib(found["peak_bytes"]),
        "-" if compiled is None else f"{compiled:.1f}",
    ]


def _plans(record: Record) -> list[str]:
    rows = [
        [
            row["part"],
            *(_gib(row[f"{what}_bytes"]) for what in ("planned", "compiled", "measured")),
            _ratio(row["measured_bytes"], row["planned_bytes"]),
            "-" if row["planned_ms"] is None else f"{row['planned_ms']:.4g}",
            f"{row['measured_ms']:.4g}",
            _ratio(row["measured_ms"], row["planned_ms"]),
            row["plan"],
        ]
        for row in against_plans(record)
    ]
    header = ("step", "GiB planned", "compiled there", "measured", "ratio", "ms planned", "measured", "ratio", "plan")
    return _table("Plans beside measurements", header, rows)


def _claims(record: Record) -> list[str]:
    rows = [
        [name, check["claim"], "yes" if check["holds"] else "**NO**", check["found"]]
        for name, part in record["parts"].items()
        for check in part.get("checks", ())
    ]
    return _table("Claims", ("part", "claim", "holds", "found"), rows)


def _golden(record: Record) -> list[str]:
    found = _result(record, "golden")
    rows = [
        [what, *(f"{value:.1e}" for value in found[key]["differences"].values())]
        for key, what in (("highest", "float32 proper"), ("default", "the device's default (TF32 on NVIDIA's)"))
        if key in found
    ]
    title = f"20 float32 steps beside those of {found.get('rows_made_with')}: largest relative differences"
    return _table(title, ("products", "loss", "grad_norm", "param_norm"), rows)


def _attention(record: Record) -> list[str]:
    rows = [
        [tokens, name, *(f"{error:.1e}" for error in errors.values())]
        for tokens, sides in _result(record, "attention").get("errors", {}).items()
        for name, errors in sides.items()
    ]
    title = "Attention in bf16: relative errors to float32's, of the output and of the gradients"
    return _table(title, ("tokens", "by", "output", "query", "key", "value"), rows)


def _kernels(record: Record) -> list[str]:
    found = _result(record, "profile")
    if "top" not in found:
        return []
    idle = "-" if found["idle_share"] is None else f"{found['idle_share']:.1%}"
    lines = [
        "## Where a B/16 step goes",
        "",
        f"{found['kernels_per_step']:,.0f} kernels a step; {found['busy_ms']:.4g} of {found['span_ms']:.4g} ms busy, "
        f"{idle} idle; {found['long_gaps_per_step']:.0f} gaps of more than 10 us a step, the longest "
        f"of all {found['longest_gap_us']:,.0f} us.",
        "",
    ]
    for title, rows in (("kind", found["families"]), ("kernel", found["top"])):
        cells = [[f"`{row['name']}`", *(f"{row[key]:.4g}" for key in ("per_step", "ms", "percent"))] for row in rows]
        lines += _table("", (title, "a step", "ms a step", "% of busy"), cells)
    return lines


def _loader(record: Record) -> list[str]:
    found = _result(record, "loader")
    rows = [
        [name, f"{one['images_per_second']:,.0f}", f"{one['a_cpu_second']:,.0f}"]
        for name, one in found.get("rates", {}).items()
    ]
    title = f"The loader on {found.get('cores')} cores: random resized crop of {found.get('size')} and flip"
    return _table(title, ("from", "img/s", "img a CPU second"), rows)


def _logs(record: Record) -> list[str]:
    lines = []
    for name, part in record["parts"].items():
        if part["status"] == "failed" and part.get("log"):
            lines += [f"## The end of {name}'s log", "", *(f"    {line[:_CELL]}" for line in part["log"]), ""]
    return lines


_SECTIONS = (_head, _parts, _ceilings, _steps, _plans, _claims, _golden, _attention, _kernels, _loader, _logs)


def _result(record: Record, name: str) -> dict[str, Any]:
    """What a part has found, however it ended; empty where it did not begin."""
    return record["parts"].get(name, {}).get("result", {})


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> list[str]:
    """The lines of a table under its title, with an empty one after it; nothing where it has no rows."""
    if not rows:
        return []
    cells = [[cell.replace("|", "/").replace("\n", " ")[:_CELL] for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]
    return [*([f"## {title}", ""] if title else []), *lines, "", *([note, ""] if note else [])]


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / _GIB:.2f}"


def _ratio(one: float | None, other: float | None) -> str:
    return f"{one / other:.3f}" if one and other else "-"


def _percent(one: float | None, other: float | None) -> str:
    return f"{one / other:.1%}" if one and other else "-"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
