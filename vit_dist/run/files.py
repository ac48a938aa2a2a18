"""Writing a file of the working directory whole or not at all, and reading one that a person may have touched.

A reader, or a run that takes up after a kill, then sees the old text or the new one and never half of either.
"""

import json
from pathlib import Path
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.data.files import replacing


def write_atomically(path: Path, text: str) -> None:
    """Puts `text` in `path`: written beside it, forced to the disk, then renamed over it."""
    with replacing(path) as stream:
        stream.write(text.encode())


def read_json(file: Path, kind: type) -> Any:
    """What a JSON file holds. Raises `ConfigError` where it is missing, damaged or not of this kind (dict or list)."""
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
