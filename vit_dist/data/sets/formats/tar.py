"""Class folders inside a tar: `<split>/<class>/<image>`, or `<class>/<image>` in a tar for each split.

The headers of a large tar take minutes to read, so the index of each split is kept; with it a compressed tar need not
even be unpacked before one of its images is wanted.
"""

import dataclasses
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.sets.examples import FileSource, SpanImages, file_source
from vit_dist.data.sets.formats.archive import TAR_SUFFIXES, Memory, Tar, followed, members, open_tar
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
from vit_dist.data.sets.index import Index, in_order, kept

Span = tuple[int, int]  # offset and size in bytes
Classes = dict[str, dict[str, Span]]  # class -> image -> where it lies


def open_split(path: Path, split: str, data: config.Data) -> FileSource:
    """A split of a tar that holds all of them, or of the tar of that split in a folder of tars.

    Labels are by the classes of the `train` split where there is one. Raises `ConfigError` for a missing split, a
    class that `train` lacks, an empty class folder, a damaged tar and what `archive` refuses.
    """
    whole = path.is_file()
    file = path if whole else find_tar(path, split)
    if file is None:
        names = " or ".join(f"{name}.tar[.gz]" for name in split_names(split))
        if find_split(split, class_folders(path)) is not None:
            raise ConfigError(f"data.source: {path} holds {split!r} as a folder; set data.source=folder")
        raise NoSplit(f"data.path: no {names} in {path}")
    tar = _open(file, data)
    index = _index(tar, split, whole, data.cache_dir)
    train_file = path if whole else find_tar(path, "train")
    if train_file is not None and split != "train":
        try:
            train = _index(_open(train_file, data), "train", whole, data.cache_dir)
            index = index.with_classes(train.class_names, file)
        except NoSplit:
            if not whole:
                raise
    assert index.spans is not None
    name = index.split if whole else file.name.partition(".")[0]
    return file_source(file, name, index, SpanImages((tar,), index.spans))


def find_tar(folder: Path, split: str) -> Path | None:
    """The tar of a split in a folder of them, such as `train.tar.gz`."""
    files = (folder / f"{name}{suffix}" for name in split_names(split) for suffix in TAR_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def ordered(classes: Classes, notes: Sequence[str] = ()) -> Index:
    """The index of the images of one tar."""
    class_names = sorted(classes)
    return in_order(
        class_names,
        [f"{name}/{image}" for name in class_names for image in classes[name]],
        [label for label, name in enumerate(class_names) for _ in classes[name]],
        [(0, *span) for name in class_names for span in classes[name].values()],
        notes,
    )


def taken_over(where: object, images: Sequence[str]) -> list[str]:
    """What an index is to note of images that a tar holds twice: the later counts, as where the tar is unpacked."""
    return left_out(where, images, "images that a later one of the same name takes the place of")


def _open(file: Path, data: config.Data) -> Tar:
    advice = f"unpack it (mkdir FOLDER && tar -xf {file} -C FOLDER) and set data.source=folder"
    return open_tar(file, Memory.of(data, advice))


def _index(tar: Tar, split: str, whole: bool, cache_dir: str | None) -> Index:
    """A split of a tar that holds all of them (`whole`), or of the split's own tar, where its folder may be missing."""

    def build() -> Index:
        splits = _splits(tar)
        name = find_split(split, splits)
        if name is None and not whole and "" in splits:
            name = ""
        if name is None:
            found = ", ".join(repr(name) for name in sorted(splits) if name) or "none"
            expected = "<split>/<class>/<image>" if whole else "<class>/<image>"
            raise NoSplit(f"{tar.path}: no split {split!r} in it; expected {expected}, found splits: {found}")
        index = splits[name]
        counts = np.bincount(index.labels, minlength=len(index.class_names)).tolist()
        check_filled(
            f"{tar.path}{':' if name else ''}{name}",
            {one: range(count) for one, count in zip(index.class_names, counts, strict=True)},
        )
        return index

    return kept(f"tar {tar.path.absolute()} {split}", tar.stamp, cache_dir, build)


_scanned: weakref.WeakKeyDictionary[Tar, dict[str, Index]] = weakref.WeakKeyDictionary()


def _splits(tar: Tar) -> dict[str, Index]:
    """The images by split, "" where the class folders lie at the top; found once while a source holds the tar."""
    if tar not in _scanned:
        _scanned[tar] = _scan(tar)
    return _scanned[tar]


def _scan(tar: Tar) -> dict[str, Index]:
    """Reads the headers of a tar and sorts what they name."""
    found: dict[tuple[str, ...], Classes] = {}  # by the folders above the class folder
    folders: list[tuple[str, ...]] = []
    ignored: list[str] = []
    doubled: list[str] = []
    with tar.stream() as stream:
        for member in followed(members(stream, tar.path), tar):
            parts = member.parts
            if member.is_folder:
                folders.append(parts)
            elif len(parts) < 2 or not is_image(parts[-1]) or any(map(is_hidden, parts)) or not _is_split(parts[:-2]):
                ignored.append(member.name)
            else:
                images = found.setdefault(parts[:-2], {}).setdefault(parts[-2], {})
                if parts[-1] in images:
                    doubled.append(member.name)
                images[parts[-1]] = (member.offset, member.size)
    for parts in folders:
        if parts and parts[:-1] in found and not any(map(is_hidden, parts)):
            found[parts[:-1]].setdefault(parts[-1], {})
    notes = [*left_out(tar.path, ignored), *taken_over(tar.path, doubled)]
    splits: dict[str, Index] = {}
    for above, classes in sorted(found.items()):
        name = above[-1] if above else ""
        if name in splits:
            raise ConfigError(f"{tar.path}: holds two folders {name!r}, one of them {'/'.join(above)}; expected one")
        splits[name] = dataclasses.replace(ordered(classes, notes), split=name)
    return splits


def _is_split(above: tuple[str, ...]) -> bool:
    """Whether these folders may stand above class folders: none, a split, or a split below one folder."""
    return len(above) < 2 or (len(above) == 2 and above[0] not in KNOWN_SPLITS)
