"""Converts any source into shards of records that are quick to read (`vit-dist prepare`), on one host or several.

The content of each shard follows from the source and the options alone (`manifest.Plan`). So hosts need not
communicate, and the set is the same however many hosts make it and however often they are interrupted.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.files import location
from vit_dist.data.prepare.shards import ImageOptions, Shard, StoredImages, measure, write_shards
from vit_dist.data.progress_bar import counted
from vit_dist.data.sets import index, manifest
from vit_dist.data.sets.examples import FileSource, Source
from vit_dist.data.sets.formats.array_record import check_size, fingerprint_of, open_reader, read_index
from vit_dist.data.sets.index import Index, Names
from vit_dist.data.sets.manifest import Entry, Manifest, Plan, Split
from vit_dist.data.sets.recognise import open_splits, sample

_log = logging.getLogger(__name__)
_SHARD_RECORDS = 2048  # records of a shard by default: about 250 MB of ImageNet's files
_SHARDS = 16, 512  # fewest and most shards by default: work for that many threads, and files that a process may open


def prepare(
    source: str | None,
    dest: str,
    *,
    kind: str | None = None,
    splits: Sequence[str] = (),
    images: ImageOptions | None = None,
    shards: int | None = None,
    shard_range: tuple[int, int] | None = None,
    workers: int | None = None,
    data: config.Data | None = None,
) -> dict[str, Any]:
    """Converts a data set into sharded records in a folder.

        from vit_dist.data.prepare.convert import ImageOptions
        prepare("photos", "records", images=ImageOptions(resize=256), shards=64)

    Args:
      source: file, folder or address of the data set; None for a kind that needs none, such as `digits`.
      dest: the folder of the records, on a mounted disk. A set that is unfinished there is continued.
      kind: what `source` is, a key of `sources.SOURCES`; None: it is recognised by its files.
      splits: the splits to convert; empty: all.
      images: how images are resized and encoded; None: encoded images are stored unchanged, pixels as `raw`.
      shards: how many shards the largest split has; the others have proportionally fewer. None: a shard for 2048
        records, from 16 to 512.
      shard_range: `(a, b)` writes shards a to b - 1 of the largest split and the corresponding ones of the others, and
        leaves the manifest to `merge`.
      workers: how many threads; None: one for each core.
      data: the config's section on data, for how the source is read (`cache_dir`, `name`, `download`,
        `memory_limit_gb`).

    Returns:
      What `vit-dist prepare` prints: `records, shards, bytes, digest, splits, classes, bad`, of the set or, with
      `shard_range`, of these shards. `bad` is None if images are stored unchanged, since none was decoded.

    Raises:
      ConfigError: the source or an image is damaged, `dest` holds anything but this set, or the disk is full.
    """
    folder = _folder(dest)
    sources = open_splits(source, kind, splits, data or config.Data())
    stored = {split: StoredImages.of(examples, images or ImageOptions()) for split, examples in sources.items()}
    indexes = {split: _index(examples) for split, examples in sources.items()}
    plan = _plan(stored, indexes, shards)
    chosen = _chosen_shards(plan, stored, indexes, shard_range)
    files = [shard.file for shard in chosen]
    if (folder / manifest.MANIFEST).exists():
        finished = manifest.read_manifest(folder)
        _check_same(folder, finished.plan, plan)
        _check_finished(folder, finished)
    else:
        _begin(folder, plan, indexes)
        write_shards(folder, plan, chosen, workers or os.cpu_count() or 1)
        if shard_range is not None:
            return _range_result(plan, _written(folder, plan, files))
        finished = _merge(folder, plan)
    if shard_range is not None:
        return _range_result(plan, [shard for shard in finished.all_shards if shard.file in files])
    return finished.result()


def merge(dest: str) -> dict[str, Any]:
    """Writes the manifest of a set of which all shards exist; returns as `prepare`.

    Raises `ConfigError`, naming the first shard that is missing or belongs to another plan.
    """
    folder = _folder(dest)
    plan = manifest.read_plan(folder)
    if plan is None or (folder / manifest.MANIFEST).exists():
        finished = manifest.read_manifest(folder)
        _check_finished(folder, finished)
    else:
        finished = _merge(folder, plan)
    return finished.result()


def verify(dest: str, workers: int | None = None) -> dict[str, Any]:
    """Reads every byte of a finished set and recomputes its digests and counts; returns as `prepare`.

    Raises `ConfigError`, naming the first file that differs from the manifest.
    """
    folder = _folder(dest)
    finished = manifest.read_manifest(folder)
    files = [*finished.indexes.values(), *finished.all_shards]

    def check(file: Entry) -> None:
        check_size(folder, file)
        path = folder / file.file
        if measure(path)[1] != file.sha256:
            raise ConfigError(f"{path}: its content is not what the manifest says; prepare or copy it again")
        if path.suffix != ".npz" and (records := open_reader(path).num_records()) != file.records:
            raise ConfigError(f"{path}: {records} records, but the manifest says {file.records}; prepare it again")

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for _ in counted(pool.map(check, files), f"reading {folder}", len(files)):
            pass
    for split in finished.indexes:
        read_index(folder, finished, split)
    return finished.result()


def _folder(dest: str) -> Path:
    if "://" in dest:
        raise ConfigError(f"{dest}: records are written to a mounted disk; prepare a folder there, then copy it")
    folder = location(dest)
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise ConfigError(f"{nearest}: is not a folder; choose another DEST")
    return folder


def _index(source: Source) -> Index:
    """Returns the index of a split that is stored with its records."""
    if isinstance(source, FileSource):
        return Index(source.class_names, source.names, source.labels)
    names = (f"{source.class_names[label]}/{number:07d}" for number, label in enumerate(source.labels.tolist()))
    return Index(source.class_names, Names.of(names), source.labels)


def _plan(stored: dict[str, StoredImages], indexes: dict[str, Index], shards: int | None) -> Plan:
    largest = max(len(images.source) for images in stored.values())
    if shards is None:
        fewest, most = _SHARDS
        shards = min(largest, most, max(fewest, -(-largest // _SHARD_RECORDS)))
    elif shards > largest:
        raise ConfigError(f"--shards={shards}: the largest split has {largest} examples; ask for {largest} or fewer")
    first, *others = stored
    for split in others:
        if stored[split].source.class_names != stored[first].source.class_names:
            raise ConfigError(
                f"the splits {first} and {split} have different classes; prepare each by itself, with --split"
            )
    splits = {
        split: Split(
            records=len(images.source),
            shards=-(-shards * len(images.source) // largest),
            fingerprint=fingerprint_of(indexes[split], images.version),
            sample=sample(images.source),
            version=images.version,
        )
        for split, images in stored.items()
    }
    options = stored[first].options
    return Plan(options.resize, options.encode, stored[first].source.class_names, splits)


def _chosen_shards(
    plan: Plan, stored: dict[str, StoredImages], indexes: dict[str, Index], shard_range: tuple[int, int] | None
) -> list[Shard]:
    """Returns the shards to write: those of the largest split in the range, and of each other split the same share."""
    most = max(split.shards for split in plan.splits.values())
    first, end = shard_range or (0, most)
    if not 0 <= first < end <= most:
        raise ConfigError(f"--shard-range={first}:{end}: expected A:B with 0 <= A < B <= {most}, the number of shards")
    return [
        Shard(file, split.ids(shard), stored[name], indexes[name].names)
        for name, split in plan.splits.items()
        for shard, file in enumerate(plan.files(name))
        if first <= shard * most // split.shards < end
    ]


def _check_same(folder: Path, old: Plan, new: Plan) -> None:
    if old != new:
        raise ConfigError(
            f"{folder}: holds another set, or part of one ({manifest.differences(old, new)}); "
            "give another DEST, or remove this one"
        )


def _begin(folder: Path, plan: Plan, indexes: dict[str, Index]) -> None:
    """Writes the plan and the indexes of a set. Raises `ConfigError` if the folder holds anything but this set."""
    old = manifest.read_plan(folder)
    if old is not None:
        _check_same(folder, old, plan)
    else:
        _check_empty(folder)
        manifest.write_plan(folder, plan)
    for split, listed in indexes.items():
        index.write(folder / manifest.index_file(split), listed)  # replaces an index, which can be another set's


def _check_empty(folder: Path) -> None:
    """Raises `ConfigError` unless the folder is empty but for what a run left that was killed before it had a plan."""
    work_folder = folder / manifest.WORK_FOLDER
    others = [file for file in _files_in(folder) if file.name not in (manifest.WORK_FOLDER, "lost+found")]
    others += [
        file for file in _files_in(work_folder) if not (manifest.is_work_file(file.name) and file.suffix == ".tmp")
    ]
    if others:
        raise ConfigError(
            f"{folder}: is not empty (it holds {min(others).relative_to(folder)}); give a new or empty folder"
        )


def _merge(folder: Path, plan: Plan) -> Manifest:
    """Writes and returns the manifest of a set of which all shards and indexes exist."""
    shards = {split: tuple(_written(folder, plan, plan.files(split))) for split in plan.splits}
    indexes: dict[str, Entry] = {}
    for name, split in plan.splits.items():
        file = folder / manifest.index_file(name)
        if not file.exists():
            raise ConfigError(f"{file}: missing; bring it from another host, or run `vit-dist prepare` again")
        indexes[name] = Entry(file.name, split.records, *measure(file))
    finished = Manifest(plan, indexes, shards)
    for name in plan.splits:
        read_index(folder, finished, name)
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)  # the files that the manifest names must be on the disk before it is
    os.close(descriptor)
    manifest.write_manifest(folder, finished)
    _tidy(folder)
    return finished


def _written(folder: Path, plan: Plan, files: Sequence[str]) -> list[Entry]:
    """Returns the entries of these shards. Raises `ConfigError`, naming the first that is not finished."""
    entries = {file: manifest.read_entry(folder, plan, file) for file in files}
    missing = [file for file, entry in entries.items() if entry is None]
    if missing:
        raise ConfigError(
            f"{folder}: {len(missing)} of {len(files)} shards are not finished, the first is {missing[0]}; run "
            f"`vit-dist prepare` for them, or copy them with {manifest.WORK_FOLDER} from the host that made them"
        )
    return [entry for entry in entries.values() if entry is not None]


def _check_finished(folder: Path, finished: Manifest) -> None:
    """Raises `ConfigError` if a file of a finished set is missing or has another size."""
    for file in [*finished.indexes.values(), *finished.all_shards]:
        check_size(folder, file)
    _log.info("%s: already finished", folder)
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Removes the temporary files of `prepare`, and no others, from a finished set."""
    for file in _files_in(folder / manifest.WORK_FOLDER):
        if manifest.is_work_file(file.name):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds files that are not ours
        (folder / manifest.WORK_FOLDER).rmdir()
    indexes = folder.glob("*.index.npz")
    temporary = (f".{manifest.MANIFEST}.", *(f".{file.name}." for file in indexes))
    for file in folder.glob(".*.tmp"):
        if file.name.startswith(temporary):
            file.unlink(missing_ok=True)


def _files_in(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _range_result(plan: Plan, shards: Sequence[Entry]) -> dict[str, Any]:
    digest = hashlib.sha256("".join([plan.digest, *(shard.sha256 for shard in shards)]).encode()).hexdigest()
    return manifest.totals(plan, shards, digest)
