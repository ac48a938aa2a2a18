"""Expands `~` in every path that a user gives: on the command line, in a config or to a function."""

from pathlib import Path

from vit_dist.schema import ConfigError


def expanded(path: str | Path, key: str) -> Path:
    """Returns the path with `~` or `~user` replaced by that home folder.

    Raises `ConfigError`, which names `key`, where no such home folder is known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}: {path}: cannot expand ~ to a home folder; write the full path") from error
