"""What becomes of a run that cannot save: it goes on with what is saved, and ends after a few failures in a row."""

import logging
import shutil
from pathlib import Path

from vit_dist.config import ConfigError

# What a disk makes Orbax and tensorstore raise. Other exceptions are faults of the program.
ERRORS = (OSError, ValueError, RuntimeError)

_log = logging.getLogger(__name__)


class SaveFailures:
    """Counts the saves that failed in a row."""

    def __init__(self, directory: Path, retries: int):
        """`retries`: after how many failures in a row, those of `directory`, the run ends."""
        self._directory, self._retries = directory, retries
        self._count = 0
        self._last: str | None = None  # why the last save failed, until somebody was told

    def note(self, step: int, error: str | None, newest: int | None, *, log: bool = True) -> None:
        """Notes how the save of a step ended.

        Args:
          step: the step.
          error: why it failed; None: it did not.
          newest: the newest step that is saved; None: there is none.
          log: whether to log a failure, after which the run goes on.

        Raises:
          ConfigError: it is the last of too many failures.
        """
        self._last = None
        if error is None:
            self._count = 0
            return
        self._count += 1
        saved = "nothing is saved yet" if newest is None else f"the newest checkpoint is of step {newest}"
        self._last = f"{self._directory}: step {step} could not be saved ({error}); {saved}"
        if self._count >= self._retries:
            self._last += f"; {self._count} failures in a row (checkpoint.retries)"
            self.check()
        if log:
            _log.warning("%s; the run goes on, but ends after %d more", self._last, self._retries - self._count)

    def check(self) -> None:
        """Raises `ConfigError` if the last save failed, once."""
        last, self._last = self._last, None
        if last is not None:
            raise ConfigError(f"{last}; make room, or mend the disk, and start the run again")


def lack_of_space(directory: Path, size: int) -> str | None:
    """Returns what is wrong if a disk has not so many bytes free; None if it has, or does not tell."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError:
        return None
    return f"the disk has {free / 1e6:,.1f} MB free, it takes {size / 1e6:,.1f} MB" if free < size else None


class _WithoutTracebacks(logging.Filter):
    """Drops what Orbax logs of exceptions, thousands of lines for a full disk: they reach the run, which tells them."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)


WITHOUT_TRACEBACKS = _WithoutTracebacks()
