"""Reads the JSON in or beside a file of weights: a `config.json`, the index of shards, the header of safetensors.

JSON of a stranger is bounded before it is parsed: two bytes of it, an empty list, take 64 bytes of memory and more.
"""

import json
from pathlib import Path
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.data.files import open_stream
from vit_dist.weights.stored_tensor import FETCH_AGAIN, printed, unreadable

LARGEST = 4 << 20  # bytes; both directions of the names of 21,843 classes take 2 MB, a header of 1,000 tensors 0.1
_MOST_CONTAINERS = 200_000  # lists and objects; three a tensor
_MOST_KEYS = 100_000  # two for each of 21,843 classes, five a tensor


def read_json(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises `ConfigError` if it holds anything else, or more than `LARGEST`."""
    try:
        with open_stream(file) as stream:
            content = stream.read(LARGEST + 1)
    except OSError as error:
        raise unreadable(file, error) from error
    if len(content) > LARGEST:
        raise ConfigError(f"{file}: is larger than {LARGEST >> 20} MiB, which no such file is; {FETCH_AGAIN}")
    return parse_json(content, file)


def parse_json(content: bytes, where: object) -> dict[str, Any]:
    """Returns a JSON object.

    Raises `ConfigError`, which begins with `where`, for other JSON, for an object with the same key twice, and for more
    lists, objects and keys than the files that are read here have.
    """
    if content.count(b"[") + content.count(b"{") > _MOST_CONTAINERS:
        raise ConfigError(f"{where}: has more than {_MOST_CONTAINERS} lists and objects; {FETCH_AGAIN}")
    if content.count(b":") > _MOST_KEYS:
        raise ConfigError(f"{where}: has more than {_MOST_KEYS} keys; {FETCH_AGAIN}")
    try:
        values = json.loads(content, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: cannot be read as JSON ({printed(error)}); {FETCH_AGAIN}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a JSON object, found {type(values).__name__}; {FETCH_AGAIN}")
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {name!r} occurs twice")
        values[name] = value
    return values
