"""Parquet shards as Hugging Face writes them: a row an image, column `image` of `{bytes, path}` and column `label`.

Parquet is read by row group: whoever wants one image reads a hundred or a thousand. So the groups read last are kept in
memory up to a limit. A set that fits there is read once; a larger one is slow in random order, and that is said.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import logging
import re
import threading
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
from vit_dist.data.sets.index import Index, in_order, kept

_log = logging.getLogger(__name__)
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_SHARD = re.compile(r".*-(\d+)-of-(\d+).*")


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of one split, in order. `name` is what the files call the split, which may be asked for by another."""

    name: str
    files: tuple[Path, ...]

    @property
    def where(self) -> Path:
        return self.files[0] if len(self.files) == 1 else self.files[0].parent / f"{self.name}-*.parquet"


class RowGroups:
    """The images of the row groups read last, at most `limit` bytes of them and those that are being read.

    Safe to ask from many threads: a group that several want is read once. What is pickled is the way to the files.
    """

    def __init__(self, files: tuple[Path, ...], limit: int) -> None:
        self.files, self.limit = files, limit
        self._lock = threading.Lock()
        self._held: collections.OrderedDict[tuple[int, int], concurrent.futures.Future[Any]] = collections.OrderedDict()
        self._sizes: dict[tuple[int, int], int] = {}
        self._total = 0

    def column(self, number: int, group: int) -> Any:
        """The image column (`pyarrow.ChunkedArray`) of a row group of `files[number]`. Raises `OSError`."""
        key = (number, group)
        with self._lock:
            held = self._held.get(key)
            if held is None:
                promised = self._held[key] = concurrent.futures.Future()
            else:
                self._held.move_to_end(key)
        if held is not None:
            return held.result()
        try:
            promised.set_result(self._read(key))
        except BaseException as error:
            with self._lock:
                self._forget(key)
            promised.set_exception(error)
            raise
        return promised.result()

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
        self._make_room(key, column.nbytes)  # repeated images take less in the file than here
        return column

    def _make_room(self, key: tuple[int, int], size: int) -> None:
        """Lets go of the groups that were wanted longest ago, until one of `size` bytes fits."""
        with self._lock:
            if key not in self._held:  # others needed the room
                return
            self._total += size - self._sizes.get(key, 0)
            self._sizes[key] = size
            self._held.move_to_end(key)
            while self._total > self.limit and len(self._held) > 1:
                self._forget(next(iter(self._held)))

    def _forget(self, key: tuple[int, int]) -> None:
        self._held.pop(key, None)
        self._total -= self._sizes.pop(key, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGroups, (self.files, self.limit)


@dataclasses.dataclass(frozen=True)
class ParquetImages:
    """Reads images out of row groups: `spans[i]` is `(file, row group, row in it)`, `int64 [N, 3]`."""

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
            return _beside(self.groups.files[number], _decoded(path.cast(pyarrow.binary()).as_py()))
        raise OSError(f"row {row} of row group {group} of {self.groups.files[number]} holds no image")


def open_split(path: Path, split: str, data: config.Data) -> FileSource:
    """The split's shards in `path` or `path/data`, or the one file that `path` is.

    Raises `ConfigError` where there are none or not all, for one that is damaged or lacks a column, for labels that are
    hidden (-1) or of no class, and for a class that is not the train split's.
    """
    shards = _find(path, split)
    if shards is None:
        raise _not_found(path, split)
    index = _index(shards, data.cache_dir)
    if shards.name != "train" and (train := _find(path, "train")) is not None:
        index = index.with_classes(_index(train, data.cache_dir).class_names, shards.where)
    limit = int(data.memory_limit_gb * 2**30) // max(1, data.workers)
    _warn_if_slow(path, shards, limit)
    assert index.spans is not None
    return file_source(shards.where, shards.name, index, ParquetImages(RowGroups(shards.files, limit), index.spans))


def _find(path: Path, split: str) -> Shards | None:
    """The shards of a split, by the first of its names that any go by."""
    if not path.is_dir():  # its name says which split it is; one without such a name is for training
        name = split_word(path.name, KNOWN_SPLITS) or "train"
        return Shards(name, (path,)) if name in split_names(split) else None
    places = [(folder, entries(folder)) for folder in (path, path / "data") if folder.is_dir()]
    for name in split_names(split):
        pattern = re.compile(rf"{re.escape(name)}([-_]\d.*)?\.parquet")
        for folder, found in places:
            files = tuple(folder / file for file, _ in found if pattern.fullmatch(file))
            if not files and (name, True) in found:
                inside = entries(folder / name)
                files = tuple(folder / name / file for file, _ in inside if file.endswith(".parquet"))
            if files:
                _check_whole(files)
                return Shards(name, files)
    return None


def _check_whole(files: tuple[Path, ...]) -> None:
    """Raises `ConfigError` where names such as `train-00001-of-00005.parquet` tell of shards that are not there."""
    numbered = [(int(found[1]), int(found[2])) for file in files if (found := _SHARD.fullmatch(file.name))]
    if numbered:
        total = numbered[0][1]
        missing = sorted(set(range(total)) - {number for number, _ in numbered})
        if missing or len(numbered) != len(files) or any(of != total for _, of in numbered):
            lacks = f"shard {missing[0]} is missing" if missing else f"their names do not all say 'of {total:05}'"
            raise ConfigError(
                f"{files[0].parent}: {len(files)} shards beside {files[0].name}, expected {total}: {lacks}; "
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
    what = f"parquet {shards.where.absolute()}"
    return kept(what, stamps, cache_dir, functools.partial(_read_labels, shards))


def _read_labels(shards: Shards) -> Index:
    """Reads the columns of labels and paths, and no images."""
    names: list[str | None] = []
    labels: list[np.ndarray] = []
    spans: list[np.ndarray] = []
    known: tuple[str, ...] | None = None
    for number, file in enumerate(counted(shards.files, f"indexing {shards.where}")):
        try:
            with _open(file) as parquet:
                image, label, classes = _layout(parquet.schema_arrow, file)
                if number and classes != known:
                    raise ConfigError(f"{file}: its metadata names other classes than {shards.files[0].name}")
                known = classes
                groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
                table = parquet.read(columns=[label, f"{image}.path"], use_threads=False)
                names += _paths(table, image)
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigError(f"{file}: cannot be read as Parquet ({first_line(error)}); fetch it again") from error
        labels.append(_labels(table.column(label), file, known))
        for group, rows in enumerate(groups):
            spans.append(np.stack(np.broadcast_arrays(number, group, np.arange(rows)), axis=1))
    if not names:
        raise ConfigError(f"{shards.where}: holds no rows")
    found = np.concatenate(labels)
    if known is None:
        known = tuple(map(str, range(int(found.max()) + 1)))
    full = [f"{known[label]}/{name or format(row, '08')}" for row, (label, name) in enumerate(zip(found, names))]
    return in_order(known, full, found, np.concatenate(spans))


def _layout(schema: Any, file: Path) -> tuple[str, str, tuple[str, ...] | None]:
    """The columns of images and labels, and the names of the classes where the metadata has them."""
    image, label = _column(schema, _IMAGE_COLUMNS, file), _column(schema, _LABEL_COLUMNS, file)
    kind = schema.field(image).type
    if pyarrow.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise ConfigError(f"{file}: column {image!r} is {kind}, expected struct<bytes, path> or binary")
    if not pyarrow.types.is_integer(schema.field(label).type):
        raise ConfigError(f"{file}: column {label!r} is {schema.field(label).type}, expected whole numbers")
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except ValueError as error:
        raise ConfigError(f"{file}: its metadata 'huggingface' is no JSON ({error})") from error
    names = described
    for key in ("info", "features", label, "names"):
        names = names.get(key) if isinstance(names, dict) else None
    if names is None:
        return image, label, None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{file}: its metadata 'huggingface' names no classes but {str(names)[:40]}; expected a list")
    return image, label, tuple(names)


def _column(schema: Any, names: tuple[str, ...], file: Path) -> str:
    found = next((name for name in names if name in schema.names), None)
    if found is None:
        raise ConfigError(f"{file}: no column {' or '.join(map(repr, names))}; it has: {', '.join(schema.names)}")
    return found


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
    """The base names of the files that the images were, None where that is not told."""
    if image not in table.column_names:
        return [None] * len(table)
    paths = pyarrow_compute.struct_field(table.column(image), ["path"]).cast(pyarrow.binary())
    return [path and PurePosixPath(_decoded(path)).name for path in paths.to_pylist()]


def _decoded(path: bytes) -> str:
    """A path, which is bytes and not always UTF-8."""
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
    """The size of a row group's images, from the footer (`pyarrow.parquet.RowGroupMetaData`)."""
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema.partition(".")[0] == image)


def _open(file: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`, of its own for each read: one may not be shared by threads."""
    return pyarrow_parquet.ParquetFile(open_stream(file) if is_remote(file) else str(file))


def _beside(shard: Path, path: str) -> bytes:
    """An image that the row only names, which must lie in the folder of the shard or below. Raises `OSError`."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise OSError(f"the row holds no bytes but a path outside of {shard.parent}: {path}")
    file = shard.parent / path
    if not file.is_file():
        raise OSError(f"the row holds no bytes but the path {path}, which is not in {shard.parent}")
    return file.read_bytes()
