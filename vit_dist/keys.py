"""The documentation of every config key, read from the schema: its type, bounds, default and the comment behind it."""

import ast
import dataclasses
import inspect
import json
import tokenize
import typing
from collections.abc import Iterator
from io import StringIO
from typing import Any

from vit_dist import config
from vit_dist.schema import describe_type


def rows(pattern: str = "") -> list[dict[str, str]]:
    """Returns {key, type, default, meaning} of every key whose name or meaning holds `pattern`, in any case."""
    wanted = pattern.casefold()
    return [row for row in _rows(config.Config) if wanted in row["key"] or wanted in row["meaning"].casefold()]


def _rows(schema: Any, prefix: str = "") -> Iterator[dict[str, str]]:
    hints, meanings = typing.get_type_hints(schema, include_extras=True), _meanings(schema)
    for field in dataclasses.fields(schema):
        key, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _rows(hint, f"{key}.")
            continue
        default = json.dumps(field.default)
        yield {"key": key, "type": describe_type(hint), "default": default, "meaning": meanings[field.name]}
        items = typing.get_args(hint)
        if items and dataclasses.is_dataclass(items[0]):  # a list of dataclasses
            yield from _rows(items[0], f"{key}[].")


def _meanings(schema: Any) -> dict[str, str]:
    """Returns the comment of each field: the one after it, continued on the lines below."""
    source = inspect.getsource(schema)
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.removeprefix("#").strip()
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    fields = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
    ends = [field.lineno for field in fields[1:]] + [len(source.splitlines()) + 1]
    return {
        ast.unparse(field.target): " ".join(comments[line] for line in range(field.lineno, end) if line in comments)
        for field, end in zip(fields, ends, strict=True)
    }
