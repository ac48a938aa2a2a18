"""Writes a file of the working directory atomically, and reads one that a person may have edited or a disk damaged.

A reader, or a run that resumes after a kill, sees the old text or the new text, never a part of either. What is read
must have the shape that its reader declares, so that the code after it need not look again.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.data.files import first_line, open_stream, read_file, replacing

ADVICE = "restore it or choose another --workdir"
_LARGEST = 64 << 20  # bytes of a JSON file; the names of 21,843 classes take 1 MB, a session of a run 2 kB
_DEEPEST = 100  # a writer that indents gives up before the reader does
_LINE_ADVICE = "repair the line or remove it"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A value that holds no others: what is expected, in words, and the test for it."""

    wanted: str
    holds: Callable[[Any], bool]


TEXT = Leaf("text", lambda value: isinstance(value, str))
WHOLE = Leaf("a whole number, 0 or more", lambda value: type(value) is int and 0 <= value < 1 << 63)
NUMBER = Leaf("a number", lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max)
COUNT = Leaf("a whole number above 0", lambda value: WHOLE.holds(value) and value > 0)
ANY_OBJECT = Leaf("an object", lambda value: isinstance(value, dict))

# The shape of a JSON value: a leaf; `[shape]`, a list of such; or an object with at least these keys. A key that ends
# with "?" may be missing or null, and "*" stands for every other key. (mypy has no types that name themselves.)
Shape = Leaf | list[Any] | dict[str, Any]


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file by `text`: writes a file beside it, syncs it to the disk, then renames it."""
    with replacing(path) as stream:
        stream.write(text.encode())


def read_json(file: Path, shape: Shape, advice: str = ADVICE) -> Any:
    """Returns the content of a JSON file.

    Args:
      file: the file.
      shape: what it must hold.
      advice: what a person can do about a file that is damaged, for the error.

    Raises:
      ConfigError: the file is missing, no file, too large, not JSON, or of another shape.
    """
    try:
        with open_stream(file) as stream:
            content = stream.read(_LARGEST + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: missing; {advice}") from error
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}; {advice}") from error
    if len(content) > _LARGEST:
        raise ConfigError(f"{file}: is larger than {_LARGEST >> 20} MiB, which no such file is; {advice}")
    value = _parsed(content, shape, str(file), advice)
    try:
        os.fsencode(json.dumps(value, ensure_ascii=False))
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON that can be written again ({error}); {advice}") from error
    if _depth(value) > _DEEPEST:
        raise ConfigError(f"{file}: not JSON that can be written again (it is nested too deeply); {advice}")
    return value


def read_json_lines(file: Path, shape: dict[str, Any], *, cut: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """Returns each line of a file of JSON objects with its object; none if there is no file.

    Args:
      file: the file.
      shape: what every line must hold.
      cut: whether a last line without an end is left out, that of a process that was killed while it wrote it.

    Raises:
      ConfigError: names the first line that is damaged.
    """
    try:
        lines = read_file(file).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}; {ADVICE}") from error
    *lines, last = lines
    if last and not cut:
        lines.append(last)
    rows = [_parsed(line, shape, f"{file}:{number}", _LINE_ADVICE) for number, line in enumerate(lines, 1)]
    return [(f"{line.decode()}\n", row) for line, row in zip(lines, rows, strict=True)]


def mismatch(value: Any, shape: Shape, key: str = "") -> str:
    """Returns where a JSON value differs from a shape: what is expected there and what it is; empty: nowhere."""
    before = f"{key}: " if key else ""
    if isinstance(shape, Leaf):
        return "" if shape.holds(value) else f"{before}expected {shape.wanted}, found {_shown(value)}"
    kind, wanted = (list, "a list") if isinstance(shape, list) else (dict, "an object")
    if not isinstance(value, kind):
        return f"{before}expected {wanted}, found {_shown(value)}"
    if isinstance(shape, list):
        inside = [(item, shape[0], f"{key}[{number}]") for number, item in enumerate(value)]
    else:
        required = [name for name in shape if name[-1] not in "?*"]
        if missing := [name for name in required if name not in value]:
            return f"{before}has no key {missing[0]!r}"
        inside = []
        assert isinstance(value, dict)
        for name, item in value.items():
            inner = shape.get(name) or shape.get(f"{name}?") or shape.get("*")
            if inner is not None and not (item is None and f"{name}?" in shape):
                inside.append((item, inner, f"{key}.{name}" if key else name))
    return next(filter(None, (mismatch(*each) for each in inside)), "")


def _parsed(content: bytes, shape: Shape, where: str, advice: str) -> Any:
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({_reason(error)}); {advice}") from error
    if problem := mismatch(value, shape):
        raise ConfigError(f"{where}: {problem}; {advice}")
    return value


def _depth(value: Any) -> int:
    """Returns how many lists and objects lie inside each other, at most."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, list | dict)]:
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
        depth += 1
    return depth


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else first_line(error)


def _shown(value: Any) -> str:
    """Returns a JSON value as an error shows it: its beginning, and of a list or an object that it is one."""
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        return f"{kind} of {len(value)}" if value else f"{kind} that is empty"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."
