"""Reads sets that TensorFlow Datasets (TFDS) prepared as ArrayRecord, without TensorFlow.

`data.path` is the folder of a prepared set, or its name (`cifar10`, `imagenet2012:5.1.0`, `name/config:version`), which
is searched for in `$TFDS_DATA_DIR`, else in `~/tensorflow_datasets`. A record is a `tf.Example`, a small message that
holds the encoded image and the label; it is parsed at each read.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.files import first_line, is_remote, stamp
from vit_dist.data.libraries import load, tfds, tfds_core, tfds_proto
from vit_dist.data.progress_bar import counted
from vit_dist.data.sets.examples import FileSource, file_source
from vit_dist.data.sets.formats.listing import NoSplit, find_split
from vit_dist.data.sets.index import Index, cached, sorted_index

_NAME_FEATURES = ("file_name", "filename", "image/filename", "id")  # features that hold the name of an image
_INFO = "dataset_info.json"


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """Images in `tf.Example` records: image `i` is feature `feature` of record `numbers[i]`, `int64 [N]`.

    `records` is an `ArrayRecordDataSource`, which threads may share and which pickles its files' names only.
    """

    records: Any
    numbers: np.ndarray
    feature: str

    def read(self, index: int) -> bytes:
        number = int(self.numbers[index])
        with _errors_as(OSError, f"record {number}"):
            return _parse(self.records[number])[self.feature].bytes_list.value[0]


def open_split(path: Path, split: str, data: config.Data) -> FileSource:
    """Opens a split of the set with the folder or name `path`.

    Raises `ConfigError` if tensorflow-datasets or the set is missing, if the set has another file format or no image or
    label, and if its labels are hidden.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource  # takes an eighth of a second

    info = _open(path).info
    suffix = "unknown" if info.file_format is None else info.file_format.file_suffix
    if suffix != "array_record":
        raise ConfigError(
            f"data.path: {info.full_name} in {info.data_dir} is prepared as {suffix}, which cannot be read at random; "
            f'prepare it elsewhere with tfds.builder({info.full_name!r}, data_dir=..., file_format="array_record")'
            f".download_and_prepare()"
        )
    name = find_split(split, info.splits)
    if name is None:
        raise NoSplit(f"data.path: {info.full_name} has no split {split!r}, but {', '.join(info.splits)}")
    image, label = _image_and_label(info)
    where = f"{info.data_dir}/{name}"
    files = [Path(file) for file in info.splits[name].filepaths]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise ConfigError(f"{missing}: a shard of {info.full_name} that is missing; prepare the set again")
    stamps = " ".join(f"{file.name} {stamp(file)}" for file in files)
    with _errors_as(ConfigError, f"{info.full_name}, split {name!r}"):
        records = ArrayRecordDataSource(info.splits[name].file_instructions)
    index = cached(f"tfds {where}", stamps, data.cache_dir, lambda: _read_labels(records, info, label, where))
    return file_source(where, name, index, TfdsImages(records, index.spans[:, 1], image))


def _open(path: Path) -> Any:
    """Returns the `tfds.core.DatasetBuilder` of a prepared set, from its files alone."""
    from google.protobuf.json_format import ParseError

    load(tfds)
    if is_remote(path):
        raise ConfigError(f"data.path: data.source=tfds reads local files only, found {path}; copy it to a local disk")
    if path.exists():
        folder = _version_folder(path)
        try:
            return tfds.builder_from_directory(str(folder))
        except (OSError, ValueError, ParseError) as error:
            raise ConfigError(
                f"{folder / _INFO}: cannot be read ({first_line(error)}); prepare the data set again"
            ) from error
    try:
        return tfds_core.read_only_builder.builder_from_files(str(path))
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise ConfigError(
            f"data.path: no folder {str(path)!r}, and no prepared data set of that name ({first_line(error)}); "
            f'tfds.builder({str(path)!r}, file_format="array_record").download_and_prepare() makes one'
        ) from error


def _version_folder(path: Path) -> Path:
    """Returns `path`, or the only folder `version` or `config/version` in it that holds a prepared set."""
    folders = [file.parent for pattern in (_INFO, f"*/{_INFO}", f"*/*/{_INFO}") for file in sorted(path.glob(pattern))]
    if not folders:
        raise ConfigError(f"data.path: no {_INFO} in {path} or two folders down; expected a prepared TFDS data set")
    if len(folders) > 1 and folders[0] != path:
        names = ", ".join(str(folder.relative_to(path)) for folder in folders[:5])
        raise ConfigError(f"data.path: {path} holds {len(folders)} data sets ({names}); name one of them")
    return folders[0]


def _image_and_label(info: Any) -> tuple[str, str]:
    """Returns the features of the image and the class: the only ones of their kind, else those of `supervised_keys`."""
    chosen = []
    for kind in (tfds.features.Image, tfds.features.ClassLabel):
        names = [name for name, feature in info.features.items() if isinstance(feature, kind)]
        if len(names) != 1:
            names = [name for name in names if name in (info.supervised_keys or ())]
        if len(names) != 1:
            raise ConfigError(
                f"data.path: {info.full_name} has no single {kind.__name__} to train on; its features are "
                f"{', '.join(info.features)}"
            )
        chosen.append(names[0])
    image, label = chosen
    if info.features[image].np_dtype not in (np.uint8, np.uint16):
        raise ConfigError(f"data.path: {info.full_name} has images of {info.features[image].np_dtype}, expected uint8")
    return image, label


def _read_labels(records: Any, info: Any, label: str, where: str) -> Index:
    """Reads the label and the name of every record; decodes no image."""
    classes = tuple(info.features[label].names)
    texts = [name for name, feature in info.features.items() if isinstance(feature, tfds.features.Text)]
    name_feature = next((name for name in _NAME_FEATURES if name in texts), None)
    names, labels = [], np.empty(len(records), np.int32)
    for number in counted(range(len(records)), f"indexing {where}"):
        with _errors_as(ConfigError, f"{where}, record {number}"):
            features = _parse(records[number])
            labels[number] = class_id = features[label].int64_list.value[0]
            name = format(number, "08")
            if name_feature is not None:
                name = PurePosixPath(features[name_feature].bytes_list.value[0].decode()).name
        if not 0 <= class_id < len(classes):
            raise ConfigError(
                f"{where}: record {number} has label {class_id}, expected 0..{len(classes) - 1}; "
                f"{'the labels of this split are hidden, take another' if class_id == -1 else 'prepare the set again'}"
            )
        names.append(f"{classes[class_id]}/{name}")
    numbers = np.arange(len(records))
    return sorted_index(classes, names, labels, np.stack(np.broadcast_arrays(0, numbers, 0), axis=1))


def _parse(record: bytes) -> Any:
    """Returns the features of a record by name."""
    return tfds_proto.tf_example_pb2.Example.FromString(record).features.feature


@contextlib.contextmanager
def _errors_as(kind: type[Exception], where: object) -> Iterator[None]:
    """Raises `kind`, naming `where`, for any error that the libraries raise on damaged or missing files."""
    from google.protobuf.message import DecodeError

    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, DecodeError) as error:
        raise kind(f"{where} cannot be read ({first_line(error)}); prepare the data set again") from error
