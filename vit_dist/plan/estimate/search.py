"""Searches for the fastest layout that fits: ranks all layouts of a target by estimate and compiles the best.

The config's own layout is compiled first, then the others in the order of `layouts`, until a few fit by the compiler's
own count of memory. The choice is the layout whose compiled program is the fastest or, if no times are known, the
first. The order depends on the config and the target alone.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from vit_dist.config import Config, ConfigError
from vit_dist.plan.analysis import Analysis
from vit_dist.plan.estimate.layouts import Layout, layouts
from vit_dist.plan.targets import Target

WANTED = 3  # layouts that must fit, beside the config's own, before the search ends
SECONDS = 480.0  # after which no compilation starts
SHOWN = 10  # layouts in the ranking
TOLERANCE = 1.1  # layouts whose estimate exceeds a device's memory by more than this factor are not compiled
GIB = 2**30

Overrides = tuple[str, ...]  # of a layout


@dataclasses.dataclass
class _Compilations:
    """The results of compiling layouts."""

    analyses: dict[Overrides, Analysis]
    skipped: set[Overrides]  # larger than a layout of the same kind that was too large
    failed: dict[Overrides, str]  # the compiler's error

    @property
    def started(self) -> bool:
        return bool(self.analyses or self.failed)

    def fits(self, layout: Layout) -> bool:
        """Whether a layout was compiled and is not too large."""
        return layout.overrides in self.analyses and self.analyses[layout.overrides]["fits"] is not False

    def peak_bytes(self, layout: Layout) -> int:
        """Returns the compiler's figure or, without one, the estimate."""
        analysis = self.analyses.get(layout.overrides)
        return layout.estimate.peak_bytes if analysis is None else analysis["peak_bytes"]


def search(
    settings: Config,
    target: Target,
    devices: Sequence[jax.Device],
    analyse: Callable[[Config], Analysis],
    *,
    wanted: int = WANTED,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Returns the fastest layouts of a config on all devices of a target, at its batch size.

    Args:
      settings: the config.
      target: the hardware.
      devices: the target's devices.
      analyse: compiles a config and returns at least {fits, peak_bytes, step_ms}.
      wanted: no compilation starts after so many layouts, beside the config's own, fit.
      seconds: no compilation starts after this time. If no compiled layout fits, the smallest is compiled in the end.

    Returns:
      - choice: {overrides, step_ms, peak_bytes} of the fastest compiled layout; None if none fits.
      - smallest: {overrides, peak_bytes} of the layout with the least memory.
      - ranking: the best layouts by estimate and all compiled ones, as {overrides, step_ms, estimated_bytes (both
        estimated), compiled_step_ms, peak_bytes (the compiler's if it was compiled), note}.
      - fallen: {reason, count, example} of the rejected layouts.

      overrides are `key=value` where a layout differs from the config.
    """
    candidates, refused = layouts(settings, target, devices)
    limit = target.chip.memory_bytes
    compiled = _compile_best(candidates, limit, analyse, wanted, time.monotonic() + seconds)
    fitting = [layout for layout in candidates if compiled.fits(layout)]
    choice = min(fitting, key=lambda layout: compiled.analyses[layout.overrides]["step_ms"] or 0.0, default=None)
    notes = {layout.overrides: _note(layout, layout is choice, compiled, limit) for layout in candidates}
    likely = [layout for layout in candidates if not notes[layout.overrides].startswith("too large by estimate")]
    shown = [layout for rank, layout in enumerate(likely) if rank < SHOWN or layout.overrides in compiled.analyses]
    smallest = min(candidates, key=compiled.peak_bytes, default=None)
    return {
        "choice": choice and _choice(choice, compiled),
        "smallest": smallest and {"overrides": list(smallest.overrides), "peak_bytes": compiled.peak_bytes(smallest)},
        "ranking": [_ranking_row(layout, compiled, notes[layout.overrides]) for layout in shown],
        "fallen": _rejected(candidates, refused, notes, limit),
    }


def _compile_best(
    candidates: list[Layout], limit: int | None, analyse: Callable[[Config], Analysis], wanted: int, deadline: float
) -> _Compilations:
    """Compiles the config's own layout and the best others until `wanted` others fit; at least one."""
    compiled, too_large, fitting = _Compilations({}, set(), {}), dict[Any, int](), 0
    for layout in sorted(candidates, key=lambda layout: layout.overrides != ()):
        if fitting == wanted or (compiled.started and time.monotonic() >= deadline):
            break
        size = layout.estimate.peak_bytes
        if limit is not None and size > TOLERANCE * limit:
            continue
        if size >= too_large.get(layout.kind, size + 1):
            compiled.skipped.add(layout.overrides)
            continue
        try:
            compiled.analyses[layout.overrides] = analyse(layout.settings)
        except ConfigError as error:  # rejects this layout alone
            compiled.failed[layout.overrides] = str(error)
            continue
        fitting += compiled.fits(layout) and layout.overrides != ()
        if not compiled.fits(layout):
            too_large[layout.kind] = size
    smallest = min(candidates, key=lambda layout: layout.estimate.peak_bytes, default=None)
    if smallest is not None and not any(map(compiled.fits, candidates)) and smallest.overrides not in compiled.analyses:
        compiled.analyses[smallest.overrides] = analyse(smallest.settings)
    return compiled


def _note(layout: Layout, is_choice: bool, compiled: _Compilations, limit: int | None) -> str:
    """Returns why a layout was or was not chosen."""
    if is_choice:
        return "the choice"
    if layout.overrides in compiled.analyses:
        return "fits" if compiled.fits(layout) else "too large by the compiler"
    if limit is not None and layout.estimate.peak_bytes > TOLERANCE * limit:
        return "too large by estimate"
    if layout.overrides in compiled.failed:
        return f"cannot be compiled: {compiled.failed[layout.overrides]}"
    if layout.overrides in compiled.skipped:
        return "larger than a similar layout that is too large by the compiler"
    return "not compiled" if layout.seconds is None else "slower by estimate, not compiled"


def _rejected(
    candidates: list[Layout], refused: list[str], notes: dict[Overrides, str], limit: int | None
) -> list[dict[str, Any]]:
    """Returns the number of layouts rejected for each reason, the most frequent first, with an example of each."""
    rows: dict[str, dict[str, Any]] = {}

    def add(reason: str, example: str) -> None:
        rows.setdefault(reason, {"reason": reason, "count": 0, "example": example})["count"] += 1

    for message in refused:
        add(f"{message.partition(':')[0]} is not valid on the mesh", message)
    for layout in candidates:
        note = notes[layout.overrides]
        if note not in ("the choice", "fits"):
            add(note, " ".join(layout.overrides) or "as it is")
    if (row := rows.get("too large by estimate")) and limit is not None:
        sizes = [layout.estimate.peak_bytes for layout in candidates]
        excess = min(size for size in sizes if size > TOLERANCE * limit) - limit
        row["reason"] += f", by {excess / GIB:.1f} GiB or more"
    return sorted(rows.values(), key=lambda row: (-row["count"], row["reason"]))


def _ranking_row(layout: Layout, compiled: _Compilations, note: str) -> dict[str, Any]:
    return {
        "overrides": list(layout.overrides),
        "step_ms": None if layout.seconds is None else layout.seconds * 1000,
        "compiled_step_ms": compiled.analyses.get(layout.overrides, {}).get("step_ms"),
        "peak_bytes": compiled.peak_bytes(layout),
        "estimated_bytes": layout.estimate.peak_bytes,
        "note": note,
    }


def _choice(layout: Layout, compiled: _Compilations) -> dict[str, Any]:
    analysis = compiled.analyses[layout.overrides]
    return {
        "overrides": list(layout.overrides), "step_ms": analysis["step_ms"], "peak_bytes": analysis["peak_bytes"]
    }  # fmt: skip
