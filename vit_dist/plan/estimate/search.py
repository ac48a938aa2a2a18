"""The quickest layout that fits: all layouts of a target ranked by arithmetic, the best of them compiled.

The compiler is asked about the config's own layout and then in the order that `layouts` gives, until a few are found
to fit: what it says of memory wins. The choice is the one of these whose compiled program is the quickest; where no
time is known, the first. The order depends on nothing but the config and the target.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from vit_dist.config import Config, ConfigError
from vit_dist.plan.estimate.layouts import Layout, layouts
from vit_dist.plan.targets import Target

Account = dict[str, Any]

FRONT = 3  # how many are to be found to fit, beside the config's own
SECONDS = 480.0  # after which no more compilations begin
SHOWN = 10
DOUBT = 1.1  # the compiler is asked about what the estimate puts no further above a device's memory than this
GIB = 2**30


@dataclasses.dataclass
class _Asked:
    """What was compiled, by overrides, and what need not be: it is larger than one like it that was refused."""

    accounts: dict[tuple[str, ...], Account]
    passed_over: set[tuple[str, ...]]
    failed: dict[tuple[str, ...], str]  # why no program could be made of it

    @property
    def begun(self) -> bool:
        return bool(self.accounts or self.failed)

    def fits(self, one: Layout) -> bool:
        """Whether the compiler found it to fit, or has no limit."""
        return one.overrides in self.accounts and self.accounts[one.overrides]["fits"] is not False


def search(
    settings: Config,
    target: Target,
    devices: Sequence[jax.Device],
    account_of: Callable[[Config], Account],
    *,
    front: int = FRONT,
    seconds: float = SECONDS,
) -> Account:
    """The quickest layouts of a config on all devices of a target, at its batch size.

    account_of: compiles a config and says {fits, peak_bytes, step_ms}. No compilation begins once `front` other layouts
    were found to fit, or after so many `seconds`; where none of those compiled fits, the smallest of all has its turn.

    Returns choice: {overrides, step_ms, peak_bytes}, the compiler's figures, None where nothing was found to fit.
    smallest: {overrides, peak_bytes} of the least memory that any layout takes. ranking: the best by estimate and all
    that were compiled, as {overrides, step_ms, estimated_bytes (both estimated), compiled_step_ms, peak_bytes (the
    compiler's where it was asked), note}. fallen: {reason, count, example}. overrides: `key=value` where a layout is
    not the config's own.
    """
    found, refused = layouts(settings, target, devices)
    limit = target.chip.memory_bytes
    asked = _ask(found, limit, account_of, front, time.monotonic() + seconds)
    fitting = [one for one in found if asked.fits(one)]
    choice = min(fitting, key=lambda one: asked.accounts[one.overrides]["step_ms"] or 0.0, default=None)
    notes = {one.overrides: _note(one, one is choice, asked, limit) for one in found}
    likely = [one for one in found if not notes[one.overrides].startswith("too large by estimate")]
    shown = [one for place, one in enumerate(likely) if place < SHOWN or one.overrides in asked.accounts]
    smallest = min(found, key=lambda one: _peak(one, asked), default=None)
    return {
        "choice": None if choice is None else _of_account(choice, asked),
        "smallest": smallest and {"overrides": list(smallest.overrides), "peak_bytes": _peak(smallest, asked)},
        "ranking": [_row(one, asked, notes[one.overrides]) for one in shown],
        "fallen": _fallen(found, refused, notes, limit),
    }


def _ask(
    found: list[Layout], limit: int | None, account_of: Callable[[Config], Account], front: int, deadline: float
) -> _Asked:
    """Compiles the config's own layout and the first others, until `front` fit; one at least."""
    asked, refused, fitting = _Asked({}, set(), {}), dict[Any, int](), 0
    for one in sorted(found, key=lambda one: one.overrides != ()):
        if fitting == front or (asked.begun and time.monotonic() >= deadline):
            break
        size = one.found.peak_bytes
        if limit is not None and size > DOUBT * limit:
            continue
        if size >= refused.get(one.kind, size + 1):
            asked.passed_over.add(one.overrides)
            continue
        try:
            asked.accounts[one.overrides] = account_of(one.settings)
        except ConfigError as error:  # of this layout, which is then none
            asked.failed[one.overrides] = str(error)
            continue
        fitting += asked.fits(one) and one.overrides != ()
        if not asked.fits(one):
            refused[one.kind] = size
    smallest = min(found, key=lambda one: one.found.peak_bytes, default=None)
    if smallest is not None and not any(map(asked.fits, found)) and smallest.overrides not in asked.accounts:
        asked.accounts[smallest.overrides] = account_of(smallest.settings)
    return asked


def _note(one: Layout, is_choice: bool, asked: _Asked, limit: int | None) -> str:
    """What became of a layout."""
    if is_choice:
        return "the choice"
    if one.overrides in asked.accounts:
        return "fits" if asked.fits(one) else "too large by the compiler"
    if limit is not None and one.found.peak_bytes > DOUBT * limit:
        return "too large by estimate"
    if one.overrides in asked.failed:
        return f"cannot be compiled: {asked.failed[one.overrides]}"
    if one.overrides in asked.passed_over:
        return "larger than one like it that the compiler found too large"
    return "not compiled" if one.seconds is None else "slower by estimate, not compiled"


def _fallen(
    found: list[Layout], refused: list[str], notes: dict[tuple[str, ...], str], limit: int | None
) -> list[Account]:
    """How many layouts fell for each reason, the commonest first, with the first of them."""
    rows: dict[str, Account] = {}

    def add(reason: str, example: str) -> None:
        rows.setdefault(reason, {"reason": reason, "count": 0, "example": example})["count"] += 1

    for message in refused:
        add(f"{message.partition(':')[0]} does not go with the mesh", message)
    for one in found:
        note = notes[one.overrides]
        if note not in ("the choice", "fits"):
            add(note, " ".join(one.overrides) or "as it is")
    if (row := rows.get("too large by estimate")) and limit is not None:
        over = min(one.found.peak_bytes for one in found if one.found.peak_bytes > DOUBT * limit) - limit
        row["reason"] += f", by {over / GIB:.1f} GiB or more"
    return sorted(rows.values(), key=lambda row: (-row["count"], row["reason"]))


def _row(one: Layout, asked: _Asked, note: str) -> Account:
    step_ms = None if one.seconds is None else one.seconds * 1000
    return {
        "overrides": list(one.overrides),
        "step_ms": step_ms,
        "compiled_step_ms": asked.accounts.get(one.overrides, {}).get("step_ms"),
        "peak_bytes": _peak(one, asked),
        "estimated_bytes": one.found.peak_bytes,
        "note": note,
    }


def _of_account(one: Layout, asked: _Asked) -> Account:
    account = asked.accounts[one.overrides]
    return {
        "overrides": list(one.overrides), "step_ms": account["step_ms"], "peak_bytes": account["peak_bytes"]
    }  # fmt: skip


def _peak(one: Layout, asked: _Asked) -> int:
    """The compiler's figure where there is one, else the estimate."""
    account = asked.accounts.get(one.overrides)
    return one.found.peak_bytes if account is None else account["peak_bytes"]
