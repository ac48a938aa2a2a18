"""Reads ImageNet (ILSVRC 2012) as it is published, without unpacking its tars.

`ILSVRC2012_img_train.tar` holds a tar for each class. `ILSVRC2012_img_val.tar` holds the images only; their labels are
in another file. A label is the index of a class's WordNet id (`n01440764`) among all ids, sorted, as everywhere in the
field. The devkit numbers the classes differently, so its numbers are translated by its own table of WordNet ids.
"""

import io
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.files import entries, stamp
from vit_dist.data.sets.examples import FileSource, SpanImages, file_source
from vit_dist.data.sets.formats.archive import Member, MemoryLimit, Tar, members, open_tar, scan
from vit_dist.data.sets.formats.listing import NoSplit, check_filled, is_hidden, is_image, left_out, required_split
from vit_dist.data.sets.formats.tar import Classes, Span, index_of, replaced
from vit_dist.data.sets.index import Index, cached

TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_NUMBERS, _TABLE = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"  # inside the devkit
_WNIDS = "imagenet_2012_validation_synset_labels.txt"
_SOLUTION = "LOC_val_solution.csv"
_WNID = re.compile(r"n\d{8}")


def open_split(path: Path, split: str, data: config.Data) -> FileSource:
    """Opens the training images or, as `val` or `test`, the validation images; names are `<wnid>/<file>`.

    The labels of the validation images come from the devkit, from a text file with one WordNet id per line in the order
    of the images' names, or from Kaggle's `LOC_val_solution.csv`. Raises `ConfigError` if a file is missing, damaged or
    does not fit the others.
    """
    name = required_split(split, TARS)
    if not path.is_dir():
        raise ConfigError(f"data.path: {path} is a file; expected the folder that holds {TARS[name]}")
    if not (path / TARS[name]).is_file():
        raise NoSplit(f"data.path: no {TARS[name]} in {path}")
    memory = MemoryLimit.of(data, "decompress it to a plain tar, which is read in place")
    tar = open_tar(path / TARS[name], memory)
    if name == "train":
        index = _train_index(tar, data.cache_dir)
    else:
        truth = _find_truth(path)
        stamps = f"{tar.stamp} {truth.name} {stamp(truth)}"
        what = f"imagenet_tar {tar.path.absolute()}"
        index = cached(what, stamps, data.cache_dir, lambda: _scan_val(tar, truth, _read_truth(truth, memory)))
        if (path / TARS["train"]).is_file():
            train = _train_index(open_tar(path / TARS["train"], memory), data.cache_dir)
            index = index.with_classes(train.class_names, tar.path)
    return file_source(tar.path, name, index, SpanImages((tar,), index.spans))


def _train_index(tar: Tar, cache_dir: str | None) -> Index:
    return cached(f"imagenet_tar {tar.path.absolute()}", tar.stamp, cache_dir, lambda: _scan_train(tar))


def _scan_train(tar: Tar) -> Index:
    classes: Classes = {}
    ignored: list[str] = []
    repeated: list[str] = []
    for member in scan(tar, _members_of_members):
        if len(member.path) == 1 and member.is_folder:
            classes.setdefault(member.path[0], {})
        elif len(member.path) == 2 and is_image(member.path[1]):
            images = classes.setdefault(member.path[0], {})
            if member.path[1] in images:
                repeated.append(member.name)
            images[member.path[1]] = (member.offset, member.size)
        elif not member.is_folder:
            ignored.append(member.name)
    notes = [*left_out(tar.path, ignored), *replaced(tar.path, repeated)]
    return check_filled(tar.path, index_of(classes, notes))


def _members_of_members(stream: IO[bytes], path: Path) -> Iterator[Member]:
    """Yields the members of the tar as if each tar in it were a folder of that name."""
    for outer in members(stream, path):
        folder, is_tar, _ = outer.name.rpartition(".tar")
        if outer.is_folder or not is_tar or is_hidden(outer.name):
            yield outer
            continue
        yield Member((folder,), outer.offset, 0, True)
        for inner in members(stream, f"{path}:{outer.name}", outer.offset, outer.offset + outer.size):
            yield inner._replace(path=(folder, *inner.path))


def _scan_val(tar: Tar, truth: Path, wnids: Sequence[str]) -> Index:
    images: dict[str, Span] = {}
    ignored: list[str] = []
    for member in scan(tar):
        if len(member.path) == 1 and is_image(member.name):
            images[member.name] = (member.offset, member.size)
        elif not member.is_folder:
            ignored.append(member.name)
    if len(images) != len(wnids):
        raise ConfigError(f"{truth}: the labels of {len(wnids)} images, but {tar.path} holds {len(images)}")
    classes: Classes = {}
    for wnid, image in zip(wnids, sorted(images), strict=True):
        classes.setdefault(wnid, {})[image] = images[image]
    return check_filled(tar.path, index_of(classes, left_out(tar.path, ignored)))


def _find_truth(folder: Path) -> Path:
    """Returns the file with the class of each validation image."""
    if (folder / DEVKIT).is_file():
        return folder / DEVKIT
    names = [name for name, is_folder in entries(folder) if not is_folder]
    texts = [folder / name for name in names if name.endswith(".txt") and "val" in name.lower()]
    for file in [*texts, *(folder / name for name in names if name == _SOLUTION)]:
        if file.name == _SOLUTION or _WNID.fullmatch(_first_line(file)):
            return file
    if texts:
        raise ConfigError(
            f"{texts[0]}: begins with {_first_line(texts[0])[:40]!r}, expected a WordNet id such as n01440764; the "
            f"devkit's numbers are not in the order of those, so put {DEVKIT}, which has their table, beside it"
        )
    raise ConfigError(
        f"data.path: no labels of the validation images in {folder}; put {DEVKIT}, {_WNIDS} or {_SOLUTION} there"
    )


def _read_truth(truth: Path, memory: MemoryLimit) -> list[str]:
    """Returns the WordNet id of each validation image, in the order of the images' names."""
    if truth.name == DEVKIT:
        return _read_devkit(open_tar(truth, memory))
    lines = truth.read_text("utf-8", "replace").split("\n")
    if truth.name == _SOLUTION:  # a header, then lines such as: ILSVRC2012_val_00000001,n01751748 10 20 300 400
        lines = [label.strip().split(" ")[0] for _, _, label in sorted(line.partition(",") for line in lines[1:])]
    wnids = [line.strip() for line in lines if line.strip()]
    for wnid in wnids:
        if not _WNID.fullmatch(wnid):
            raise ConfigError(f"{truth}: holds {wnid[:40]!r}, expected a WordNet id such as n01440764")
    return wnids


def _read_devkit(devkit: Tar) -> list[str]:
    from scipy.io import loadmat  # imported here: it takes a second that other sources need not pay
    from scipy.io.matlab import MatReadError

    files: dict[str, bytes] = {}
    with devkit.stream() as stream:
        for member in members(stream, devkit.path):
            files["/".join(member.path[-2:])] = devkit.read(member.offset, member.size)
    missing = [name for name in (_NUMBERS, _TABLE) if name not in files]
    if missing:
        raise ConfigError(f"{devkit.path}: no {missing[0]} in it; is it the devkit of ILSVRC 2012's tasks 1 and 2?")
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(files[_TABLE]), squeeze_me=True)["synsets"])
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        return [wnids[int(number)] for number in files[_NUMBERS].split()]
    except KeyError as error:
        raise ConfigError(f"{devkit.path}: {_TABLE} has no {error}; fetch it again") from error
    except (MatReadError, ValueError, TypeError, IndexError, EOFError, OSError, zlib.error) as error:
        raise ConfigError(f"{devkit.path}: {_TABLE} or {_NUMBERS} cannot be read ({error}); fetch it again") from error


def _first_line(file: Path) -> str:
    with file.open("rb") as stream:
        return stream.readline(1000).decode("utf-8", "replace").strip()
