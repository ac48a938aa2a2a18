"""Reads Parquet shards as Hugging Face writes them: a row per image, columns `image` of `{bytes, path}` and `label`.

Parquet is read by row group: one image costs the reading of a hundred or a thousand. The last groups read are therefore
kept in memory up to a limit. A set that fits is read once. A larger one is slow in random order; a warning says so.
"""

import dataclasses
import json
import logging
import re
import threading
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.files import entries, first_line, is_remote, open_stream, stamp
from vit_dist.data.libraries import pyarrow, pyarrow_compute, pyarrow_parquet
from vit_dist.data.progress_bar import counted
from vit_dist.data.sets.examples import FileSource, file_source
from vit_dist.data.sets.formats.listing import KNOWN_SPLITS, MOST_CLASSES, NoSplit, split_names, split_word
from vit_dist.data.sets.index import Index, cached, sorted_index

_log = logging.getLogger(__name__)
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_SHARD = re.compile(r".*-(\d+)-of-(\d+).*")


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of one split, in order. `name` is the split's name in the files, such as `validation` for `test`."""

    name: str
    files: tuple[Path, ...]

    @property
    def where(self) -> Path:
        return self.files[0] if len(self.files) == 1 else self.files[0].parent / f"{self.name}-*.parquet"


class RowGroups:
    """A cache of the row groups read last: at most `limit` bytes, plus the groups that are being read.

    Threads may share it: a group that several need is read once. Pickles the paths only.
    """

    def __init__(self, files: tuple[Path, ...], limit: int) -> None:
        """Takes the shards and the limit in bytes."""
        self.files, self.limit = files, limit
        self._lock = threading.Lock()
        # (file, group) -> image column; the one used longest ago comes first
        self._cache: OrderedDict[tuple[int, int], Future[Any]] = OrderedDict()
        self._sizes: dict[tuple[int, int], int] = {}
        self._total = 0

    def column(self, number: int, group: int) -> Any:
        """Returns the image column (`pyarrow.ChunkedArray`) of a row group of `files[number]`. Raises `OSError`."""
        key = (number, group)
        with self._lock:
            is_new = key not in self._cache
            column = self._cache.setdefault(key, Future())
            self._cache.move_to_end(key)
        if is_new:
            try:
                column.set_result(self._read(key))
            except BaseException as error:
                with self._lock:
                    self._evict(key)
                column.set_exception(error)
        return column.result()  # waits if another thread is reading it

    def _read(self, key: tuple[int, int]) -> Any:
        number, group = key
        file = self.files[number]
        try:
            with _open(file) as parquet:
                name = _column(parquet.schema_arrow, _IMAGE_COLUMNS, file)
                self._make_room(key, _image_bytes(parquet.metadata.row_group(group), name))
                column = parquet.read_row_group(group, columns=[name], use_threads=False).column(name)
        except (OSError, pyarrow.ArrowException, ConfigError) as error:
            raise OSError(f"row group {group} of {file} cannot be read ({first_line(error)})") from error
        self._make_room(key, column.nbytes)  # repeated images take less room in the file than in memory
        return column

    def _make_room(self, key: tuple[int, int], size: int) -> None:
        """Evicts the groups used longest ago until one of `size` bytes fits."""
        with self._lock:
            if key not in self._cache:  # it was evicted meanwhile
                return
            self._total += size - self._sizes.get(key, 0)
            self._sizes[key] = size
            self._cache.move_to_end(key)
            while self._total > self.limit and len(self._cache) > 1:
                self._evict(next(iter(self._cache)))

    def _evict(self, key: tuple[int, int]) -> None:
        self._cache.pop(key, None)
        self._total -= self._sizes.pop(key, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGroups, (self.files, self.limit)


@dataclasses.dataclass(frozen=True)
class ParquetImages:
    """The images in a split's shards. `spans` `int64 [N, 3]` holds (file, row group, row in the group) of each."""

    groups: RowGroups
    spans: np.ndarray

    def read(self, index: int) -> bytes:
        number, group, row = self.spans[index].tolist()
        image, path = self.groups.column(number, group)[row], None
        if isinstance(image, pyarrow.StructScalar) and image.is_valid:
            image, path = image["bytes"], image.get("path")
        if image.is_valid:
            return image.as_py()
        if path is not None and path.is_valid:
            return _read_beside(self.groups.files[number], _decoded(path.cast(pyarrow.binary()).as_py()))
        raise OSError(f"row {row} of row group {group} of {self.groups.files[number]} holds no image")


def open_split(path: Path, split: str, data: config.Data) -> FileSource:
    """Opens a split's shards in `path` or `path/data`, or the single file `path`.

    Raises `ConfigError` if shards are missing, damaged or lack a column, if labels are hidden (-1) or not the number of
    a class, and if the train split lacks a class.
    """
    shards = _find(path, split)
    if shards is None:
        raise _not_found(path, split)
    index = _index(shards, data.cache_dir)
    if shards.name != "train" and (train := _find(path, "train")) is not None:
        index = index.with_classes(_index(train, data.cache_dir).class_names, shards.where)
    limit = int(data.memory_limit_gb * 2**30) // max(1, data.workers)
    _warn_if_slow(path, shards, limit)
    return file_source(shards.where, shards.name, index, ParquetImages(RowGroups(shards.files, limit), index.spans))


def _find(path: Path, split: str) -> Shards | None:
    """Returns the shards of a split, under the first of its names that any file has; None if there are none."""
    if not path.is_dir():  # the file's name tells the split; if it does not, the file is the train split
        name = split_word(path.name, KNOWN_SPLITS) or "train"
        return Shards(name, (path,)) if name in split_names(split) else None
    listings = [(folder, entries(folder)) for folder in (path, path / "data") if folder.is_dir()]
    for name in split_names(split):
        pattern = re.compile(rf"{re.escape(name)}([-_]\d.*)?\.parquet")
        for folder, listed in listings:
            files = tuple(folder / file for file, _ in listed if pattern.fullmatch(file))
            if not files and (name, True) in listed:
                inside = entries(folder / name)
                files = tuple(folder / name / file for file, _ in inside if file.endswith(".parquet"))
            if files:
                _check_complete(files)
                return Shards(name, files)
    return None


def _check_complete(files: tuple[Path, ...]) -> None:
    """Raises `ConfigError` if names such as `train-00001-of-00005.parquet` imply shards that are missing."""
    numbered = [(int(match[1]), int(match[2])) for file in files if (match := _SHARD.fullmatch(file.name))]
    if numbered:
        total = numbered[0][1]
        missing = sorted(set(range(total)) - {number for number, _ in numbered})
        if missing or len(numbered) != len(files) or any(of != total for _, of in numbered):
            problem = f"shard {missing[0]} is missing" if missing else f"their names do not all say 'of {total:05}'"
            raise ConfigError(
                f"{files[0].parent}: {len(files)} shards beside {files[0].name}, expected {total}: {problem}; "
                f"fetch the set again"
            )


def _not_found(path: Path, split: str) -> ConfigError:
    names = " or ".join(f"{name}-*.parquet" for name in split_names(split))
    if path.is_dir():
        found = ", ".join(name for name, _ in entries(path)[:5]) or "nothing"
        return NoSplit(f"data.path: no {names} in {path} or in its folder 'data'; found: {found}")
    return NoSplit(
        f"data.path: {path} is one file of one split, and not of {split!r}; name the folder that holds {names} too"
    )


def _index(shards: Shards, cache_dir: str | None) -> Index:
    stamps = " ".join(f"{file.name} {stamp(file)}" for file in shards.files)
    return cached(f"parquet {shards.where.absolute()}", stamps, cache_dir, lambda: _read_labels(shards))


def _read_labels(shards: Shards) -> Index:
    """Reads the columns of labels and paths, but no images."""
    names: list[str | None] = []
    labels: list[np.ndarray] = []
    spans: list[np.ndarray] = []
    class_names: tuple[str, ...] | None = None
    for number, file in enumerate(counted(shards.files, f"indexing {shards.where}")):
        try:
            with _open(file) as parquet:
                image, label, listed = _layout(parquet.schema_arrow, file)
                if number and listed != class_names:
                    raise ConfigError(f"{file}: its metadata names other classes than {shards.files[0].name}")
                class_names = listed
                groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
                table = parquet.read(columns=[label, f"{image}.path"], use_threads=False)
                names += _paths(table, image)
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigError(f"{file}: cannot be read as Parquet ({first_line(error)}); fetch it again") from error
        labels.append(_labels(table.column(label), file, class_names))
        for group, count in enumerate(groups):
            spans.append(np.stack(np.broadcast_arrays(number, group, np.arange(count)), axis=1))
    if not names:
        raise ConfigError(f"{shards.where}: holds no rows")
    all_labels = np.concatenate(labels)
    if class_names is None:
        class_names = tuple(map(str, range(int(all_labels.max()) + 1)))
    rows = enumerate(zip(all_labels, names))
    full_names = [f"{class_names[label]}/{name or format(row, '08')}" for row, (label, name) in rows]
    return sorted_index(class_names, full_names, all_labels, np.concatenate(spans))


def _layout(schema: Any, file: Path) -> tuple[str, str, tuple[str, ...] | None]:
    """Returns the columns of images and labels, and the class names, or None if the metadata has none."""
    image, label = _column(schema, _IMAGE_COLUMNS, file), _column(schema, _LABEL_COLUMNS, file)
    kind = schema.field(image).type
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise ConfigError(f"{file}: column {image!r} is {kind}, expected struct<bytes, path> or binary")
    if not pyarrow.types.is_integer(schema.field(label).type):
        raise ConfigError(f"{file}: column {label!r} is {schema.field(label).type}, expected whole numbers")
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: its metadata 'huggingface' is no JSON ({error})") from error
    names = metadata
    for key in ("info", "features", label, "names"):
        names = names.get(key) if isinstance(names, dict) else None
    if names is None:
        return image, label, None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{file}: its metadata 'huggingface' names no classes but {str(names)[:40]}; expected a list")
    return image, label, tuple(names)


def _column(schema: Any, names: tuple[str, ...], file: Path) -> str:
    column = next((name for name in names if name in schema.names), None)
    if column is None:
        raise ConfigError(f"{file}: no column {' or '.join(map(repr, names))}; it has: {', '.join(schema.names)}")
    return column


def _labels(column: Any, file: Path, classes: tuple[str, ...] | None) -> np.ndarray:
    if column.null_count:
        raise ConfigError(f"{file}: {column.null_count} of {len(column)} labels are null; take a split with labels")
    labels = column.to_numpy()
    count = MOST_CLASSES if classes is None else len(classes)
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if len(wrong):
        hidden = "this split's labels are hidden; take another" if (labels == -1).all() else "repair it"
        raise ConfigError(f"{file}: row {wrong[0]} has label {labels[wrong[0]]}, expected 0..{count - 1}; {hidden}")
    return labels.astype(np.int32)


def _paths(table: Any, image: str) -> list[str | None]:
    """Returns the base name of each image's original file, None where the row has none."""
    if image not in table.column_names:
        return [None] * len(table)
    paths = pyarrow_compute.struct_field(table.column(image), ["path"]).cast(pyarrow.binary())
    return [path and PurePosixPath(_decoded(path)).name for path in paths.to_pylist()]


def _decoded(path: bytes) -> str:
    """Decodes a path, which is bytes and not always UTF-8."""
    return path.decode("utf-8", "surrogateescape")


def _warn_if_slow(path: Path, shards: Shards, limit: int) -> None:
    total = sum(file.stat().st_size for file in shards.files)
    if total <= limit:
        return
    file = shards.files[0]
    with _open(file) as parquet:
        image = _column(parquet.schema_arrow, _IMAGE_COLUMNS, file)
        groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
    cost = sum(_image_bytes(group, image) for group in groups) / len(groups) * (1 - limit / total)
    _log.warning(
        "%s: its %.3g GiB do not fit in data.memory_limit_gb (%.3g GiB a process), so that one image read in random "
        "order costs %.3g MiB (row groups of %d images); raise it, or run `vit-dist prepare %s DEST`",
        shards.where,
        total / 2**30,
        limit / 2**30,
        cost / 2**20,
        groups[0].num_rows,
        path,
    )


def _image_bytes(group: Any, image: str) -> int:
    """Returns the size of a row group's images from its `pyarrow.parquet.RowGroupMetaData`."""
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema.partition(".")[0] == image)


def _open(file: Path) -> Any:
    """Returns a new `pyarrow.parquet.ParquetFile` for each read: threads may not share one."""
    return pyarrow_parquet.ParquetFile(open_stream(file) if is_remote(file) else str(file))


def _read_beside(shard: Path, path: str) -> bytes:
    """Reads an image that a row names but does not contain. Raises `OSError` if it is not below the shard's folder."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise OSError(f"the row holds no bytes but a path outside of {shard.parent}: {path}")
    file = shard.parent / path
    if not file.is_file():
        raise OSError(f"the row holds no bytes but the path {path}, which is not in {shard.parent}")
    return file.read_bytes()
