"""Writes a file of the working directory atomically, and reads one that a person may have edited.

A reader, or a run that resumes after a kill, sees the old text or the new text, never a part of either.
"""

import json
from pathlib import Path
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.data.files import replacing


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file by `text`: writes a file beside it, syncs it to the disk, then renames it."""
    with replacing(path) as stream:
        stream.write(text.encode())


def read_json(file: Path, kind: type) -> Any:
    """Returns the content of a JSON file. Raises `ConfigError` if it is missing, damaged or no `kind` (dict, list)."""
    advice = "restore it or choose another --workdir"
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: missing; {advice}") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error}); {advice}") from error
    if not isinstance(value, kind):
        raise ConfigError(f"{file}: holds a {type(value).__name__}, expected a {kind.__name__}; {advice}")
    return value
