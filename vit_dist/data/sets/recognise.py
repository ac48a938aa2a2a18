"""Recognises which `data.source` a folder or file is, and which splits it has.

The source is recognised by file names and, in a tar, by its first members. The splits are those that can be opened.
"""

import dataclasses
import hashlib
import itertools
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.files import entries, location, open_stream
from vit_dist.data.sets.examples import FileSource, Source, fingerprint
from vit_dist.data.sets.formats.archive import TAR_SUFFIXES
from vit_dist.data.sets.formats.listing import KNOWN_SPLITS, NoSplit, is_hidden, is_image
from vit_dist.data.sets.manifest import MANIFEST, PLAN
from vit_dist.data.sets.sources import SOURCES, open_source

_log = logging.getLogger(__name__)
_SUFFIXES = {".parquet": "parquet", ".npz": "npz", ".npy": "npz"}
_FOLDER_SOURCES = ("idx", "imagenet_tar", "webdataset")  # a split is several files
_IMAGENET_PREFIX = "ILSVRC2012_img_"
_FIRST_MEMBERS = 8  # of a tar, to look at: a few samples of a WebDataset, with their labels
_SAMPLED_IMAGES = 16  # of a split


def open_splits(path: str | None, kind: str | None, splits: Sequence[str], data: config.Data) -> dict[str, Source]:
    """Opens splits of a data set.

    Args:
      path: its folder, file or address; None for a set that needs none.
      kind: a key of `SOURCES`; None to recognise it from its files.
      splits: the splits to open; empty for all that the set has.
      data: the other keys, such as `cache_dir`.

    Returns:
      The splits by name.

    Raises:
      ConfigError: as `recognise` and `open_source` do, and if there is no split.
    """
    if kind is None:
        if path is None:
            raise ConfigError("no SOURCE is given; give it before DEST, or name a set that needs none, --source=digits")
        kind = recognise(location(path, "SOURCE"))
        _log.info("%s: recognised as --source=%s", path, kind)
    if kind in _FOLDER_SOURCES and path is not None and location(path, "SOURCE").is_file():
        raise ConfigError(f"{path}: is one file of a set (--source={kind}); name the folder that holds it")
    data = dataclasses.replace(data, source=kind, path=path)
    if splits:
        return {split: open_source(data, split) for split in splits}
    sources: dict[str, Source] = {}
    missing: list[NoSplit] = []
    for split in ("train", "test", "val"):
        try:
            sources[split] = open_source(data, split)
        except NoSplit as error:
            missing.append(error)
    if not sources and path is not None and location(path, "SOURCE").is_file():
        raise ConfigError(f"{missing[0]}; if it is one split's file, name the folder that holds it") from missing[0]
    if not sources:
        raise missing[0]
    if "test" in sources and "val" in sources and _are_equal(sources["test"], sources["val"]):
        del sources["test" if sources["val"].split.startswith("val") else "val"]  # the set has one, under two names
    return sources


def sample(source: Source) -> str:
    """Returns a digest of images spread evenly over a split. Raises `ConfigError` if one cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    for index in sorted({i * (len(source) - 1) // (_SAMPLED_IMAGES - 1) for i in range(_SAMPLED_IMAGES)}):
        image = _content(source, index)
        digest.update(f"{len(image)} ".encode() + image)
    return digest.hexdigest()


def _are_equal(a: Source, b: Source) -> bool:
    """Returns whether two splits have the same names, labels and sampled images."""
    return len(a) == len(b) and fingerprint(a) == fingerprint(b) and sample(a) == sample(b)


def _content(source: Source, index: int) -> bytes:
    if not isinstance(source, FileSource):
        image = source.images[index]
        return str(image.shape).encode() + image.tobytes()
    try:
        return source.read(index)
    except OSError as error:
        raise ConfigError(f"{source.name(index)}: cannot be read ({error}); repair or remove it") from error


def recognise(path: Path, option: str = "--source") -> str:
    """Returns the key of `SOURCES` that fits `path`. Raises `ConfigError` if none or several fit: `option` says it."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    kinds = _kinds_of_folder(path) if path.is_dir() else _kinds_of_file(path)
    if len(kinds) == 1:
        return kinds.pop()
    what = "no data set that is known by its files; name the folder that holds its splits, or say"
    if kinds:
        what = f"may be {' or '.join(sorted(kinds))}; say"
    raise ConfigError(f"{path}: {what} which with {option}, one of {', '.join(SOURCES)}")


def _kinds_of_folder(folder: Path) -> set[str]:
    listed = [(name, is_folder) for name, is_folder in entries(folder) if not is_hidden(name)]
    if any(name == MANIFEST for name, _ in listed) or (folder / PLAN).exists():
        return {"array_record"}
    if any(name == "dataset_info.json" for name, _ in listed):
        return {"tfds"}
    kinds = _kinds_of_files(folder, listed)
    for name, is_folder in listed:
        if is_folder and (name in KNOWN_SPLITS or name == "data"):
            inner = [entry for entry in entries(folder / name) if not is_hidden(entry[0])]
            if any(is_inner_folder for _, is_inner_folder in inner) and name in KNOWN_SPLITS:
                kinds.add("folder")
            kinds |= _kinds_of_files(folder / name, inner)
    return kinds


def _kinds_of_files(folder: Path, listed: list[tuple[str, bool]]) -> set[str]:
    """Returns the kinds of a folder's files. Looks into one tar only: ImageNet's own if it is there, else the first."""
    names = [name for name, is_folder in listed if not is_folder]
    tars = [name for name in names if name.endswith(TAR_SUFFIXES)]
    others = [name for name in names if name not in tars]
    tars.sort(key=lambda name: not name.startswith(_IMAGENET_PREFIX))
    return set().union(*(_kinds_of_file(folder / name) for name in [*tars[:1], *others]))


def _kinds_of_file(path: Path) -> set[str]:
    if path.name.endswith(TAR_SUFFIXES):
        return _kinds_of_tar(path)
    if "-ubyte" in path.name:
        return {"idx"}
    return {_SUFFIXES[path.suffix]} if path.suffix in _SUFFIXES else set()


def _kinds_of_tar(path: Path) -> set[str]:
    if path.name.startswith(_IMAGENET_PREFIX):
        return {"imagenet_tar"}
    try:
        with open_stream(path) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            files = (member.name for member in tar if member.isfile())
            members = list(itertools.islice(files, _FIRST_MEMBERS))
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    if members and all(member.endswith(".tar") for member in members):
        return {"imagenet_tar"}
    if any(member.endswith((".cls", ".json")) for member in members):
        return {"webdataset"}
    return {"tar"} if any(is_image(member.rpartition("/")[2]) for member in members) else set()
