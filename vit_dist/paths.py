"""Paths that people write: `~` is their home folder, in every path of the command line, of a config and of a call."""

from pathlib import Path

from vit_dist.schema import ConfigError


def expanded(path: str | Path, key: str) -> Path:
    """Returns the path with `~` or `~user` replaced by that home folder.

    Raises `ConfigError`, which names `key`, where no such home folder is known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}: {path}: no home folder of that user is known; write the path out") from error
