"""Reads class folders on a disk: `<split>/<class>/<image>`, one file per image."""

import dataclasses
from pathlib import Path

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.files import entries, folders_stamp, read_file
from vit_dist.data.progress_bar import counted
from vit_dist.data.sets.examples import FileSource, file_source
from vit_dist.data.sets.formats import tar
from vit_dist.data.sets.formats.listing import (
    NoSplit,
    check_filled,
    class_folders,
    find_split,
    is_hidden,
    is_image,
    left_out,
    split_names,
)
from vit_dist.data.sets.index import Index, Names, cached, sorted_index


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """Images that are files below the folder `root`."""

    root: Path
    names: Names

    def read(self, index: int) -> bytes:
        return read_file(self.root / self.names[index])


def open_split(path: Path, split: str, data: config.Data) -> FileSource:
    """Opens the images in `path/<split>`. Raises `ConfigError` if there are none or the train split lacks a class."""
    if not path.is_dir():
        raise ConfigError(f"data.path: {path} is a file; data.source=folder needs a folder, or set data.source=tar")
    splits = class_folders(path)
    name = find_split(split, splits)
    if name is None:
        if tar.find_tar(path, split) is not None:
            raise ConfigError(f"data.source: {path} holds {split!r} as a tar; set data.source=tar")
        raise NoSplit(
            f"data.path: no folder {' or '.join(map(repr, split_names(split)))} in {path}; "
            f"expected <split>/<class>/<image>, found: {', '.join(splits[:5]) or 'no folders'}"
        )
    folder, classes = path / name, class_folders(path / name)
    stamp = folders_stamp([folder, *(folder / class_name for class_name in classes)])
    index = cached(f"folder {folder.absolute()}", stamp, data.cache_dir, lambda: _walk(folder, classes))
    if name != "train" and "train" in splits:
        index = index.with_classes(class_folders(path / "train"), folder)
    return file_source(folder, name, index, FolderImages(folder, index.names))


def _walk(folder: Path, folders: tuple[str, ...]) -> Index:
    classes: dict[str, list[str]] = {}
    ignored = [name for name, is_folder in entries(folder) if is_hidden(name) or not is_folder]
    for name in counted(folders, f"listing {folder}"):
        listed = entries(folder / name)
        classes[name] = [image for image, is_folder in listed if is_image(image) and not is_folder]
        ignored += [f"{name}/{other}" for other, is_folder in listed if is_folder or not is_image(other)]
    labels = [label for label, name in enumerate(folders) for _ in classes[name]]
    names = [f"{name}/{image}" for name in folders for image in classes[name]]
    return check_filled(folder, sorted_index(folders, names, labels, notes=left_out(folder, ignored)))
