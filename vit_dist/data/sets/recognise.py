"""What kind of data set lies in a place, and which splits it has.

The kind is told from the names of files and, of a tar, from its first members; the splits are those that can be opened.
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
_OF_MANY_FILES = ("idx", "imagenet_tar", "webdataset")
_IMAGENET = "ILSVRC2012_img_"
_FIRST = 8  # members of a tar to look at: a few samples of a WebDataset, with their labels
_SAMPLE = 16  # images that speak for a split


def open_splits(source: str | None, kind: str | None, splits: Sequence[str], data: config.Data) -> dict[str, Source]:
    """The splits that are asked for, or all that a data set has, by name; its kind is told from its files if not given.

    Raises `ConfigError` as `recognise` and `open_source` do, and where it has none.
    """
    if kind is None:
        if source is None:
            raise ConfigError("no SOURCE is given; give it before DEST, or name a set that needs none, --source=digits")
        kind = recognise(location(source, "SOURCE"))
        _log.info("%s: taken for --source=%s", source, kind)
    if kind in _OF_MANY_FILES and source is not None and location(source, "SOURCE").is_file():
        raise ConfigError(f"{source}: is one file of a set (--source={kind}); name the folder that holds it")
    data = dataclasses.replace(data, source=kind, path=source)
    if splits:
        return {split: open_source(data, split) for split in splits}
    found: dict[str, Source] = {}
    missing: list[NoSplit] = []
    for split in ("train", "test", "val"):
        try:
            found[split] = open_source(data, split)
        except NoSplit as error:
            missing.append(error)
    if not found and source is not None and location(source, "SOURCE").is_file():
        raise ConfigError(f"{missing[0]}; if it is one split's file, name the folder that holds it") from missing[0]
    if not found:
        raise missing[0]
    if "test" in found and "val" in found and _are_one(found["test"], found["val"]):  # one stands for the other
        del found["test" if found["val"].split.startswith("val") else "val"]
    return found


def sample(source: Source) -> str:
    """A digest of the images at places all over a split. Raises `ConfigError` for one that cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    for number in sorted({place * (len(source) - 1) // (_SAMPLE - 1) for place in range(_SAMPLE)}):
        image = _content(source, number)
        digest.update(f"{len(image)} ".encode() + image)
    return digest.hexdigest()


def _are_one(a: Source, b: Source) -> bool:
    """Whether two splits have the same names and labels, and the same images at places all over."""
    return len(a) == len(b) and fingerprint(a) == fingerprint(b) and sample(a) == sample(b)


def _content(source: Source, number: int) -> bytes:
    if not isinstance(source, FileSource):
        image = source.images[number]
        return str(image.shape).encode() + image.tobytes()
    try:
        return source.read(number)
    except OSError as error:
        raise ConfigError(f"{source.name(number)}: cannot be read ({error}); repair or remove it") from error


def recognise(path: Path) -> str:
    """The key of `SOURCES` for what lies at `path`. Raises `ConfigError` where that is none of them, or several."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    found = _in_folder(path) if path.is_dir() else _file(path, path.name)
    if len(found) == 1:
        return found.pop()
    what = (
        f"may be {' or '.join(sorted(found))}; say"
        if found
        else ("no data set that is known by its files; name the folder that holds its splits, or say")
    )
    raise ConfigError(f"{path}: {what} which with --source, one of {', '.join(SOURCES)}")


def _in_folder(folder: Path) -> set[str]:
    listed = [(name, is_folder) for name, is_folder in entries(folder) if not is_hidden(name)]
    if any(name == MANIFEST for name, _ in listed) or (folder / PLAN).exists():
        return {"array_record"}
    if any(name == "dataset_info.json" for name, _ in listed):
        return {"tfds"}
    found = _files(folder, listed)
    for name, is_folder in listed:
        if is_folder and (name in KNOWN_SPLITS or name == "data"):
            below = [one for one in entries(folder / name) if not is_hidden(one[0])]
            if any(is_inner for _, is_inner in below) and name in KNOWN_SPLITS:
                found.add("folder")
            found |= _files(folder / name, below)
    return found


def _files(folder: Path, listed: list[tuple[str, bool]]) -> set[str]:
    """What the files of a folder are; of several tars one speaks for all, ImageNet's own before what lies beside it."""
    names = [name for name, is_folder in listed if not is_folder]
    tars = [name for name in names if name.endswith(TAR_SUFFIXES)]
    others = [name for name in names if name not in tars]
    tars.sort(key=lambda name: not name.startswith(_IMAGENET))
    return set().union(*(_file(folder / name, name) for name in [*tars[:1], *others]))


def _file(path: Path, name: str) -> set[str]:
    if name.endswith(TAR_SUFFIXES):
        return _tar(path, name)
    if "-ubyte" in name:
        return {"idx"}
    return {_SUFFIXES[path.suffix]} if path.suffix in _SUFFIXES else set()


def _tar(path: Path, name: str) -> set[str]:
    if name.startswith(_IMAGENET):
        return {"imagenet_tar"}
    try:
        with open_stream(path) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            members = [member.name for member in itertools.islice((one for one in tar if one.isfile()), _FIRST)]
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    if members and all(member.endswith(".tar") for member in members):
        return {"imagenet_tar"}
    if any(member.endswith((".cls", ".json")) for member in members):
        return {"webdataset"}
    return {"tar"} if any(is_image(member.rpartition("/")[2]) for member in members) else set()
