"""Reads class folders inside a tar: `<split>/<class>/<image>`, or `<class>/<image>` in a tar for each split.

The headers of a large tar take minutes to read, so the index of each split is cached. With it, a compressed tar is
unpacked only when the first image is read.
"""

import dataclasses
import weakref
from collections.abc import Sequence
from pathlib import Path

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.sets.examples import FileSource, SpanImages, file_source
from vit_dist.data.sets.formats.archive import TAR_SUFFIXES, MemoryLimit, Tar, open_tar, scan
from vit_dist.data.sets.formats.listing import (
    KNOWN_SPLITS,
    NoSplit,
    check_filled,
    class_folders,
    find_split,
    is_hidden,
    is_image,
    left_out,
    split_names,
)
from vit_dist.data.sets.index import Index, cached, sorted_index

Span = tuple[int, int]  # offset and size in bytes
Classes = dict[str, dict[str, Span]]  # class -> image -> span


def open_split(path: Path, split: str, data: config.Data) -> FileSource:
    """Opens a split of a tar of all splits, or of a folder with a tar for each split.

    Labels follow the classes of the `train` split if there is one. Raises `ConfigError` for a missing split, a class
    that `train` lacks, an empty class folder, a damaged tar and members that `archive` refuses.
    """
    holds_all = path.is_file()
    file = path if holds_all else find_tar(path, split)
    if file is None:
        names = " or ".join(f"{name}.tar[.gz]" for name in split_names(split))
        if find_split(split, class_folders(path)) is not None:
            raise ConfigError(f"data.source: {path} holds {split!r} as a folder; set data.source=folder")
        raise NoSplit(f"data.path: no {names} in {path}")
    tar = _open(file, data)
    index = _index(tar, split, holds_all, data.cache_dir)
    train_file = path if holds_all else find_tar(path, "train")
    if train_file is not None and split != "train":
        try:
            train = _index(_open(train_file, data), "train", holds_all, data.cache_dir)
            index = index.with_classes(train.class_names, file)
        except NoSplit:
            if not holds_all:
                raise
    name = index.split if holds_all else file.name.partition(".")[0]
    return file_source(file, name, index, SpanImages((tar,), index.spans))


def find_tar(folder: Path, split: str) -> Path | None:
    """Returns the tar of a split in a folder, such as `train.tar.gz`; None if there is none."""
    files = (folder / f"{name}{suffix}" for name in split_names(split) for suffix in TAR_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def index_of(classes: Classes, notes: Sequence[str] = ()) -> Index:
    """Returns the index of the images of one tar."""
    class_names = sorted(classes)
    return sorted_index(
        class_names,
        [f"{name}/{image}" for name in class_names for image in classes[name]],
        [label for label, name in enumerate(class_names) for _ in classes[name]],
        [(0, *span) for name in class_names for span in classes[name].values()],
        notes,
    )


def replaced(where: object, images: Sequence[str]) -> list[str]:
    """Returns an index's note about images that a tar holds twice: the later one counts, as when a tar is unpacked."""
    return left_out(where, images, "images that a later one of the same name replaces")


def _open(file: Path, data: config.Data) -> Tar:
    advice = f"unpack it (mkdir FOLDER && tar -xf {file} -C FOLDER) and set data.source=folder"
    return open_tar(file, MemoryLimit.of(data, advice))


def _index(tar: Tar, split: str, holds_all: bool, cache_dir: str | None) -> Index:
    """Returns the index of a split in a tar of all splits (`holds_all`) or in its own, with or without its folder."""

    def build() -> Index:
        splits = _splits(tar)
        name = find_split(split, splits)
        if name is None and not holds_all and "" in splits:
            name = ""
        if name is None:
            names = ", ".join(repr(name) for name in sorted(splits) if name) or "none"
            expected = "<split>/<class>/<image>" if holds_all else "<class>/<image>"
            raise NoSplit(f"{tar.path}: no split {split!r} in it; expected {expected}, found splits: {names}")
        return check_filled(f"{tar.path}{':' if name else ''}{name}", splits[name])

    return cached(f"tar {tar.path.absolute()} {split}", tar.stamp, cache_dir, build)


_scanned: weakref.WeakKeyDictionary[Tar, dict[str, Index]] = weakref.WeakKeyDictionary()


def _splits(tar: Tar) -> dict[str, Index]:
    """Returns the index of each split; its name is "" if class folders are at the top.

    Reads the headers of a tar only once while a source holds it.
    """
    if tar in _scanned:
        return _scanned[tar]
    classes_in: dict[tuple[str, ...], Classes] = {}  # by the folders above the class folder
    folders: list[tuple[str, ...]] = []
    ignored: list[str] = []
    repeated: list[str] = []
    for member in scan(tar):
        path = member.path
        if member.is_folder:
            folders.append(path)
        elif len(path) < 2 or not is_image(path[-1]) or any(map(is_hidden, path)) or not _is_split(path[:-2]):
            ignored.append(member.name)
        else:
            images = classes_in.setdefault(path[:-2], {}).setdefault(path[-2], {})
            if path[-1] in images:
                repeated.append(member.name)
            images[path[-1]] = (member.offset, member.size)
    for path in folders:
        if path and path[:-1] in classes_in and not any(map(is_hidden, path)):
            classes_in[path[:-1]].setdefault(path[-1], {})
    notes = [*left_out(tar.path, ignored), *replaced(tar.path, repeated)]
    splits: dict[str, Index] = {}
    for above, classes in sorted(classes_in.items()):
        name = above[-1] if above else ""
        if name in splits:
            raise ConfigError(f"{tar.path}: holds two folders {name!r}, one of them {'/'.join(above)}; expected one")
        splits[name] = dataclasses.replace(index_of(classes, notes), split=name)
    _scanned[tar] = splits
    return splits


def _is_split(above: tuple[str, ...]) -> bool:
    """Returns whether class folders may be below these folders: none, a split, or a split below one other folder."""
    return len(above) < 2 or (len(above) == 2 and above[0] not in KNOWN_SPLITS)
