"""Writing a file of the working directory whole or not at all.

A reader, or a run that takes up after a kill, then sees the old text or the new one and never half of either.
"""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Puts `text` in `path`: written beside it, forced to the disk, then renamed over it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
