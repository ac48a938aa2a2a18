"""Expands `~` in every local path that a user gives, on the command line, in a config or to a function.

A path that is the address of a store is refused: as a path it would name a folder `gs:` of the current folder. (Data
may have one, and `data.files.location` opens it.)
"""

import re
from pathlib import Path

from vit_dist.schema import ConfigError

_ADDRESS = re.compile("[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


def expanded(path: str | Path, key: str) -> Path:
    """Returns the path with `~` or `~user` replaced by that home folder.

    Raises `ConfigError`, which names `key`, where no such home folder is known, and for an address, `scheme://...`.
    """
    slashes = "/" if isinstance(path, str) else ""  # a Path of an address has lost its second slash
    if (address := _ADDRESS.match(str(path))) and str(path).startswith(slashes, address.end()):
        raise ConfigError(f"{key}: {path}: is an address, expected a path on a disk; mount it, or copy to and from it")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}: {path}: cannot expand ~ to a home folder; write the full path") from error
