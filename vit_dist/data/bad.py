"""Examples that could not be read or decoded, and how many of them a run bears."""

from collections.abc import Sequence
from typing import NamedTuple

from vit_dist.config import ConfigError


class Bad(NamedTuple):
    """An example that could not be read or decoded."""

    id: int
    name: str
    reason: str


def check_bad(bad: Sequence[Bad], max_bad_fraction: float, examples: int) -> None:
    """Raises `ConfigError` where these different examples are more than may be skipped, or all there are."""
    if bad and len(bad) > min(max_bad_fraction * examples, examples - 1):
        raise ConfigError(
            f"data.max_bad_fraction: {len(bad)} of {examples} files did not decode, more than the share of "
            f"{max_bad_fraction:g} that may be skipped; the last is {bad[-1].name}: {bad[-1].reason}"
        )
