"""Reads WebDataset: shards are tars, and the files of a sample share a key.

`0001.jpg` beside `0001.cls` or `0001.json` is an image and its label; the key is the path up to the first dot of the
file's name. A split is a folder of shards, or the shards whose names contain the split's name as a word.

One scan reads all headers and labels, and its index is cached. After it, samples are read in place in any order,
although the format was made for reading in sequence.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.files import allow_open_files, entries, is_remote, stamp
from vit_dist.data.progress_bar import counted
from vit_dist.data.sets.examples import FileSource, SpanImages, distinct_names, file_source
from vit_dist.data.sets.formats.archive import TAR_SUFFIXES, Member, MemoryLimit, Tar, members, open_tar
from vit_dist.data.sets.formats.listing import (
    IMAGE_SUFFIXES,
    KNOWN_SPLITS,
    MOST_CLASSES,
    NoSplit,
    is_hidden,
    left_out,
    split_names,
    split_word,
)
from vit_dist.data.sets.index import Index, cached, sorted_index

_CLASS_FILES = ("classes.txt", "classnames.txt")
# Keys of a sample's JSON, as in timm's sets and img2dataset's extra columns.
_LABEL_KEYS = ("label", "cls")
_NAME_KEYS = ("class_name", "classname", "label_name", "class_id", "synset", "wnid")
Label = int | str  # a class's number or its name


class _Shard(NamedTuple):
    """The examples of one shard."""

    examples: list[tuple[str, Label, int, int]]  # name, label, and the offset and size of the image in bytes
    class_names: set[tuple[int, str]]  # label and class name, as the samples' JSON gives them
    ignored: list[str]  # files and samples that were left out


def open_split(path: Path, split: str, data: config.Data) -> FileSource:
    """Opens the samples of a split's shards, named `<key>.<suffix>`, with labels from `.cls`, else from `.json`.

    Labels are numbers or names of classes. Class names come from `classes.txt` or `classnames.txt` beside the shards,
    else from the samples' JSON, else they are the numbers.

    Raises `ConfigError` for a missing split, a damaged shard, two files of one name in a shard, labels that do not fit
    the classes, and members that `archive` refuses.
    """
    if not path.is_dir():
        raise ConfigError(f"data.path: {path} is a file; data.source=webdataset needs the folder of its shards")
    name, shards = find_shards(path, split)
    if not shards:
        names = " or ".join(split_names(split))
        tar_names = [name for name, is_folder in entries(path) if not is_folder and name.endswith(TAR_SUFFIXES)]
        raise NoSplit(
            f"data.path: no shards of {split!r} in {path}; expected {names} as a folder of tars or as a word of their "
            f"names (train-0000.tar), found: {', '.join(tar_names[:3]) or 'no tars'}"
        )
    class_file = _class_file(path, shards)
    tars, index = _open(shards, class_file, path, split, data)
    _, train = find_shards(path, "train")
    if split != "train" and train and class_file is None:
        index = _with_train_classes(index, _open(train, None, path, "train", data)[1], shards[0].parent)
    return file_source(shards[0].parent, name, index, SpanImages(tars, index.spans))


def find_shards(folder: Path, split: str) -> tuple[str, list[Path]]:
    """Returns a split's name in the folder and its shards, sorted; ("", []) if there are none.

    If a shard's name holds two words that are splits, the last counts.
    """
    listed = entries(folder)
    tars = [name for name, is_folder in listed if not is_folder and _is_shard(name)]
    for name in split_names(split):
        if (name, True) in listed:
            inside = [shard for shard, is_folder in entries(folder / name) if not is_folder and _is_shard(shard)]
            if inside:
                return name, [folder / name / shard for shard in inside]
        shards = [tar for tar in tars if split_word(tar, (*KNOWN_SPLITS, name)) == name]
        if shards:
            return name, [folder / tar for tar in shards]
    return "", []


def _is_shard(name: str) -> bool:
    return not is_hidden(name) and name.endswith(TAR_SUFFIXES)


def _class_file(path: Path, shards: Sequence[Path]) -> Path | None:
    """Returns the file with the class names, one per line, beside a split's shards or its folder; None if none is."""
    files = [folder / name for folder in (shards[0].parent, path) for name in _CLASS_FILES]
    return next((file for file in files if file.is_file()), None)


def _open(
    shards: Sequence[Path], class_file: Path | None, path: Path, split: str, data: config.Data
) -> tuple[tuple[Tar, ...], Index]:
    memory = MemoryLimit.of(data, "decompress the shards to plain tars, which are read in place")
    with ThreadPoolExecutor(data.threads) as pool:  # each is a request if the shards are remote
        tars = tuple(pool.map(lambda shard: open_tar(shard, memory), shards))
    if not is_remote(path):
        allow_open_files(tars, 1, path)
    stamps = [f"{tar.path.name} {tar.stamp}" for tar in tars]
    if class_file is not None:
        stamps.append(f"{class_file.name} {stamp(class_file)}")

    def build() -> Index:
        class_names = None if class_file is None else _read_class_names(class_file)
        return _scan(tars, class_names, data.threads)

    return tars, cached(f"webdataset {path.absolute()} {split}", "\n".join(stamps), data.cache_dir, build)


def _scan(tars: Sequence[Tar], class_names: Sequence[str] | None, threads: int) -> Index:
    """Reads the headers and labels of all shards, several at a time."""
    where = tars[0].path.parent
    with ThreadPoolExecutor(threads) as pool:
        scanned = list(counted(pool.map(_scan_shard, tars), f"indexing the shards in {where}", len(tars)))
    ignored = [name for shard in scanned for name in shard.ignored]
    notes = left_out(where, ignored, "samples or files without an image or a label")
    labels = [label for shard in scanned for _, label, _, _ in shard.examples]
    if not labels:
        raise ConfigError(
            f"{where}: no sample with an image and a label; expected KEY.jpg beside KEY.cls or KEY.json (for class "
            "folders in tars, set data.source=tar)"
        )
    sample_names = set().union(*(shard.class_names for shard in scanned))
    if class_names is None and len(dict(sample_names)) < len(sample_names):
        notes.append(f"{where}: the samples of one label name several classes; classes are called by their numbers")
        sample_names = set()
    class_names, numbers = _classes(labels, class_names, sample_names, where)
    names = [name for shard in scanned for name, _, _, _ in shard.examples]
    spans = [(number, offset, size) for number, shard in enumerate(scanned) for _, _, offset, size in shard.examples]
    return sorted_index(class_names, names, numbers, spans, notes)


def _scan_shard(tar: Tar) -> _Shard:
    suffixes: dict[str, set[str]] = {}  # of a sample's files, by key
    images: dict[str, Member] = {}  # by key
    labels: dict[tuple[str, str], Label | None] = {}  # by key and suffix, `cls` or `json`
    class_names: dict[str, str | None] = {}  # by key
    shard = _Shard([], set(), [])
    with tar.stream() as stream:
        for member in members(stream, tar.path):
            folder, slash, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            if member.is_folder:
                continue
            if not (stem and dot) or any(map(is_hidden, member.path)):
                shard.ignored.append(member.name)
                continue
            key, suffix = folder + slash + stem, suffix.lower()
            if suffix in suffixes.setdefault(key, set()):
                raise ConfigError(f"{tar.path}: holds {member.name!r} twice; make or fetch it again")
            suffixes[key].add(suffix)
            if f".{suffix}" in IMAGE_SUFFIXES:
                if key in images:
                    raise ConfigError(f"{tar.path}: {images[key].name!r} and {member.name!r} are images of one sample")
                images[key] = member
            elif suffix in ("cls", "json"):
                stream.seek(member.offset)
                content = stream.read(member.size)
                if suffix == "cls":
                    labels[key, "cls"] = _label(content.decode("utf-8", "replace"))
                else:
                    labels[key, "json"], class_names[key] = _json_label(content)
    for key in suffixes:
        image, label = images.get(key), labels.get((key, "cls"))
        if label is None:
            label = labels.get((key, "json"))
        if image is None or label is None:
            shard.ignored.append(key)
            continue
        shard.examples.append((image.name, label, image.offset, image.size))
        if isinstance(label, int) and (class_name := class_names.get(key)):
            shard.class_names.add((label, class_name))
    return shard


def _json_label(content: bytes) -> tuple[Label | None, str | None]:
    """Returns the label and the class name in a sample's JSON, None for either that is missing."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(values, dict):
        return None, None
    labels = [_label(values[key]) for key in _LABEL_KEYS if key in values]
    names = [values[key].strip() for key in _NAME_KEYS if isinstance(values.get(key), str) and values[key].strip()]
    return next((label for label in labels if label is not None), None), (names[0] if names else None)


def _label(value: Any) -> Label | None:
    """Returns the label that a value means: a number, also as text, or a class name; None for -1 and anything else."""
    if isinstance(value, str):
        text = value.strip()
        if not re.fullmatch(r"-?\d{1,18}", text, re.ASCII):
            return text or None
        value = int(text)
    if isinstance(value, float) and value.is_integer():  # tables with missing values turn integers into floats
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _classes(
    labels: Sequence[Label], listed: Sequence[str] | None, sample_names: set[tuple[int, str]], where: Path
) -> tuple[Sequence[str], np.ndarray]:
    """Returns the class names and the labels as numbers, from the listed names, else from those in the samples."""
    numbers = [label for label in labels if isinstance(label, int)]
    names = {label for label in labels if isinstance(label, str)}
    if listed is None and numbers and names:
        raise ConfigError(
            f"{where}: some labels are numbers ({numbers[0]}), some are names ({min(names)!r}); "
            f"list the names in {_CLASS_FILES[0]}, a line each"
        )
    if listed is None:
        if numbers and max(numbers) >= MOST_CLASSES:
            raise ConfigError(f"{where}: label {max(numbers)} is not a class number")
        by_number = dict(sample_names)
        listed = sorted(names) or distinct_names([by_number.get(n, str(n)) for n in range(max(numbers) + 1)])
    if numbers and max(numbers) >= len(listed):
        raise ConfigError(f"{where}: label {max(numbers)}, but {len(listed)} classes are listed; list them all")
    table = {name: number for number, name in enumerate(listed)}
    unknown = sorted(names - set(table))
    if unknown:
        raise ConfigError(f"{where}: label {unknown[0]!r} is not among the {len(listed)} classes that are listed")
    return listed, np.array([label if isinstance(label, int) else table[label] for label in labels], np.int32)


def _read_class_names(file: Path) -> list[str]:
    return distinct_names([line.strip() for line in file.read_text("utf-8", "replace").strip().split("\n")])


def _with_train_classes(index: Index, train: Index, where: Path) -> Index:
    """Returns the examples with the train split's classes, matched by number if the names allow it, else by name."""
    by_number = len(index.class_names) <= len(train.class_names) and all(
        name in (train.class_names[number], str(number)) for number, name in enumerate(index.class_names)
    )
    if by_number:
        return dataclasses.replace(index, class_names=train.class_names)
    return index.with_classes(train.class_names, where)
