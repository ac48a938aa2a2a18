"""A profiler's trace, reduced to the kernels that take most time and to the gaps between them.

On a GPU the planes `/device:GPU:N` have a line for each stream, `Stream #13(Compute)`, whose events are the kernels,
copies and fills that ran there. A CPU's trace has no such planes: there the events count that name an XLA operation.
Loops among those hold other events, so that a CPU's shares may add up to more than one.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

MOST = 25
_NAME_LENGTH = 120
_LONG_GAP_NS = 10_000
# What kind of work a kernel's name speaks of; the first that matches.
_FAMILIES = {
    "attention": r"sdpa|fmha|flash|attention",
    "products": r"nvjet|gemm|cutlass|xmma|cublas|gemv|\bdot",
    "copies and fills": r"memcpy|memset|copy|transpose",
    "reductions": r"reduc",
    "fusions": r"fusion",
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An event on a device."""

    name: str
    start_ns: float
    ns: float


def kernels(file: Path) -> list[Kernel]:
    """All that ran on devices, in the order of beginning."""
    return of_data(ProfileData.from_file(str(file)))


def outline(file: Path) -> list[str]:
    """`plane / line: events` of every line, for whoever looks for kernels that `kernels` has not found."""
    planes = ProfileData.from_file(str(file)).planes
    return [f"{plane.name} / {line.name}: {len(list(line.events))}" for plane in planes for line in plane.lines]


def of_data(data: ProfileData) -> list[Kernel]:
    """As `kernels`, of a trace that is in memory."""
    planes = list(data.planes)
    on_gpu = [plane for plane in planes if plane.name.startswith("/device:GPU:")]
    if on_gpu:
        lines = [line for plane in on_gpu for line in plane.lines if line.name.startswith("Stream #")]
        events = [event for line in lines for event in line.events]
    else:
        lines = [line for plane in planes if plane.name.startswith("/host:CPU") for line in plane.lines]
        events = [event for line in lines for event in line.events if "hlo_op" in dict(event.stats)]
    found = [Kernel(event.name, event.start_ns, event.duration_ns) for event in events]
    return sorted(found, key=lambda one: one.start_ns)


def summary(found: list[Kernel], steps: int) -> dict[str, Any]:
    """What `steps` steps ran, a step: kernels, ms, the share of time without any, the most expensive names, families.

    Shares of kernels are of the time that any kernel ran (`busy_ms`).
    """
    busy, gaps = busy_and_gaps(found)
    span = busy + sum(gaps)
    by_name, by_family = _sums(found, lambda one: one.name), _sums(found, lambda one: family(one.name))
    return {
        "kernels_per_step": len(found) / steps,
        "busy_ms": busy / steps / 1e6,
        "span_ms": span / steps / 1e6,
        "idle_share": sum(gaps) / span if span else None,
        "long_gaps_per_step": sum(gap > _LONG_GAP_NS for gap in gaps) / steps,
        "longest_gap_us": max(gaps, default=0) / 1000,
        "top": _rows(by_name, steps, busy)[:MOST],
        "families": _rows(by_family, steps, busy),
    }


def busy_and_gaps(found: Iterable[Kernel]) -> tuple[float, list[float]]:
    """Nanoseconds in which at least one kernel ran, and each stretch between without any; sorted by start."""
    busy, gaps, end = 0.0, [], None
    for one in found:
        stop = one.start_ns + one.ns
        if end is None or one.start_ns >= end:
            if end is not None and one.start_ns > end:
                gaps.append(one.start_ns - end)
            busy, end = busy + one.ns, stop
        elif stop > end:
            busy, end = busy + stop - end, stop
    return busy, gaps


def family(name: str) -> str:
    """What kind of work a kernel does, by its name."""
    return next((kind for kind, pattern in _FAMILIES.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def _sums(found: Iterable[Kernel], key: Callable[[Kernel], str]) -> dict[str, tuple[int, float]]:
    """(count, nanoseconds) by what `key` says of a kernel."""
    sums: dict[str, tuple[int, float]] = {}
    for one in found:
        count, ns = sums.get(key(one), (0, 0.0))
        sums[key(one)] = count + 1, ns + one.ns
    return sums


def _rows(sums: dict[str, tuple[int, float]], steps: int, busy: float) -> list[dict[str, Any]]:
    """The most expensive first."""
    return [
        {"name": name[:_NAME_LENGTH], "per_step": count / steps, "ms": ns / steps / 1e6, "percent": 100 * ns / busy}
        for name, (count, ns) in sorted(sums.items(), key=lambda one: -one[1][1])
    ]
