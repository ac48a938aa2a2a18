"""Examples that could not be read or decoded, and the limits on how many of them a run skips."""

from collections.abc import Sequence
from typing import NamedTuple

from vit_dist.config import ConfigError


class BadExample(NamedTuple):
    """An example that could not be read or decoded."""

    id: int
    name: str
    reason: str


class TooManyBadExamples(ConfigError):
    """More examples of a set could not be read or decoded than the config allows."""


def check_none_bad(bad: Sequence[BadExample]) -> None:
    """Raises `TooManyBadExamples`, naming the first of these examples, unless there are none."""
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise TooManyBadExamples(f"{bad[0].name}: {bad[0].reason}{more}; repair or remove it, or set data.on_bad=skip")


def check_bad(bad: Sequence[BadExample], max_bad_fraction: float, examples: int) -> None:
    """Raises `TooManyBadExamples` if these are more than may be skipped, or all that the split has.

    Args:
      bad: distinct examples.
      max_bad_fraction: the share of the split that may be skipped.
      examples: how many the split has.
    """
    if bad and len(bad) > min(max_bad_fraction * examples, examples - 1):
        raise TooManyBadExamples(
            f"data.max_bad_fraction: {len(bad)} of {examples} files did not decode, more than the share of "
            f"{max_bad_fraction:g} that may be skipped; the last is {bad[-1].name}: {bad[-1].reason}"
        )
