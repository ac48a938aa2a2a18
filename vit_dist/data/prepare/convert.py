"""`vit-dist prepare`: any source to shards of records that are quick to read, by one process or by several hosts.

What each shard holds follows from the source and the options alone (`manifest.Plan`), so nobody needs to ask who makes
which, and the same set comes out however many make it and however often they are interrupted.
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
from vit_dist.data.prepare.shards import Shard, Stored, make, measure
from vit_dist.data.progress_bar import counted
from vit_dist.data.sets import index, manifest
from vit_dist.data.sets.examples import FileSource, Source
from vit_dist.data.sets.formats.array_record import check_size, fingerprint_of, open_reader, read_index
from vit_dist.data.sets.index import Index, Names
from vit_dist.data.sets.manifest import Entry, Manifest, Plan, Split
from vit_dist.data.sets.recognise import open_splits, sample

_log = logging.getLogger(__name__)
_SHARD_RECORDS = 2048  # about 250 MB of ImageNet's files
_SHARDS = 16, 512  # by default: work for so many threads at least, and not more files than a process may hold open


def prepare(
    source: str | None,
    dest: str,
    *,
    kind: str | None = None,
    splits: Sequence[str] = (),
    resize: int | None = None,
    encode: str | None = None,
    shards: int | None = None,
    shard_range: tuple[int, int] | None = None,
    workers: int | None = None,
    keep_bad: bool = False,
    data: config.Data | None = None,
) -> dict[str, Any]:
    """Converts the data set at `source` into records in the folder `dest`; returns what the command prints.

    `kind` is a key of `sources.SOURCES` (None: told from the files), `splits` none for all. `shards` is the number for
    the largest split, of which the others get their part; `shard_range` `(a, b)` makes those alone, of the others the
    part that corresponds, and leaves the manifest to `merge`. With neither `resize` (of the short side, in pixels) nor
    `encode` (`jpeg` or `raw`) encoded images are stored untouched. `keep_bad`: see `shards.make`. `data` may say how
    the source is read. In the result `bad` is None where images are stored untouched: nobody looked.

    Raises `ConfigError` where the source or its images are damaged, `dest` holds anything else, or the disk is full.
    """
    place = _folder(dest)
    opened = open_splits(source, kind, splits, data or config.Data())
    stored = {name: Stored.of(one, resize, encode) for name, one in opened.items()}
    listed = {name: _list(one) for name, one in opened.items()}
    plan = _plan(stored, listed, shards)
    chosen = _chosen(plan, shard_range)
    files = [one.file for one in chosen]
    if (place / manifest.MANIFEST).exists():
        whole = manifest.read_manifest(place)
        _check_same(place, whole.plan, plan)
        _check_finished(place, whole)
    else:
        _begin(place, plan, listed)
        names = {name: one.names for name, one in listed.items()}
        make(place, plan, chosen, stored, names, keep_bad, workers or os.cpu_count() or 1)
        if shard_range is not None:
            return _result_of_range(plan, _made(place, plan, files))
        whole = _merge(place, plan)
    if shard_range is not None:
        return _result_of_range(plan, [shard for shard in whole.all_shards if shard.file in files])
    return whole.result()


def merge(dest: str) -> dict[str, Any]:
    """Checks that all shards of a set are there and of one plan, and writes its manifest; returns as `prepare`.

    Raises `ConfigError` naming the first that is not.
    """
    place = _folder(dest)
    plan = manifest.read_plan(place)
    if plan is None or (place / manifest.MANIFEST).exists():
        whole = manifest.read_manifest(place)
        _check_finished(place, whole)
    else:
        whole = _merge(place, plan)
    return whole.result()


def verify(dest: str, workers: int | None = None) -> dict[str, Any]:
    """Reads every byte of a finished set and recomputes its digests and counts; returns as `prepare`.

    Raises `ConfigError` naming the first file that is not as the manifest says.
    """
    place = _folder(dest)
    whole = manifest.read_manifest(place)
    files = [*whole.indexes.values(), *whole.all_shards]

    def check(file: Entry) -> None:
        check_size(place, file)
        path = place / file.file
        if measure(path)[1] != file.sha256:
            raise ConfigError(f"{path}: its content is not what the manifest says; prepare or copy it again")
        if path.suffix != ".npz" and (records := open_reader(path).num_records()) != file.records:
            raise ConfigError(f"{path}: {records} records, but the manifest says {file.records}; prepare it again")

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for _ in counted(pool.map(check, files), f"reading {place}", len(files)):
            pass
    for name in whole.indexes:
        read_index(place, whole, name)
    return whole.result()


def _folder(dest: str) -> Path:
    if "://" in dest:
        raise ConfigError(f"{dest}: records are written to a mounted disk; prepare a folder there, then copy it")
    place = location(dest)
    there = next(one for one in (place, *place.parents) if os.path.lexists(one))
    if not there.is_dir():
        raise ConfigError(f"{there}: is no folder; give one for the records, or a new name")
    return place


def _list(source: Source) -> Index:
    """What a set lists of a split."""
    if isinstance(source, FileSource):
        return Index(source.class_names, source.names, source.labels)
    names = (f"{source.class_names[label]}/{number:07d}" for number, label in enumerate(source.labels.tolist()))
    return Index(source.class_names, Names.of(names), source.labels)


def _plan(stored: dict[str, Stored], listed: dict[str, Index], shards: int | None) -> Plan:
    largest = max(len(one.source) for one in stored.values())
    if shards is None:
        least, most = _SHARDS
        shards = min(largest, most, max(least, -(-largest // _SHARD_RECORDS)))
    elif shards > largest:
        raise ConfigError(f"--shards={shards}: the largest split has {largest} examples; ask for {largest} or fewer")
    first, *others = stored
    for name in others:
        if stored[name].source.class_names != stored[first].source.class_names:
            raise ConfigError(f"the splits {first} and {name} have other classes; prepare each by itself, with --split")
    splits = {
        name: Split(
            records=len(one.source),
            shards=-(-shards * len(one.source) // largest),
            fingerprint=fingerprint_of(listed[name], one.version),
            sample=sample(one.source),
            version=one.version,
        )
        for name, one in stored.items()
    }
    return Plan(stored[first].resize, stored[first].encode, stored[first].source.class_names, splits)


def _chosen(plan: Plan, shard_range: tuple[int, int] | None) -> list[Shard]:
    """The shards to make. A range counts the largest split's; of one with fewer it takes those at the same places."""
    most = max(split.shards for split in plan.splits.values())
    first, end = shard_range or (0, most)
    if not 0 <= first < end <= most:
        raise ConfigError(f"--shard-range={first}:{end}: expected A:B with 0 <= A < B <= {most}, the number of shards")
    return [
        Shard(name, split.ids(shard), file)
        for name, split in plan.splits.items()
        for shard, file in enumerate(plan.files(name))
        if first <= shard * most // split.shards < end
    ]


def _check_same(place: Path, old: Plan, new: Plan) -> None:
    if old != new:
        raise ConfigError(
            f"{place}: holds another set, or part of one ({manifest.differences(old, new)}); "
            "give another DEST, or remove this one"
        )


def _begin(place: Path, plan: Plan, listed: dict[str, Index]) -> None:
    """Makes the folder with its plan and indexes, or finds that it is of the same plan."""
    old = manifest.read_plan(place)
    if old is not None:
        _check_same(place, old, plan)
    else:
        _check_empty(place)
        manifest.write_plan(place, plan)
    for name, one in listed.items():
        index.write(place / manifest.index_file(name), one)  # over one that is there: it may be of another set


def _check_empty(place: Path) -> None:
    """Raises `ConfigError` where anything lies in a folder but what a run left that was killed before it had a plan."""
    parts = place / manifest.PARTS
    found = [file for file in _within(place) if file.name not in (manifest.PARTS, "lost+found")]
    found += [file for file in _within(parts) if not (manifest.is_part(file.name) and file.suffix == ".tmp")]
    if found:
        other = min(found).relative_to(place)
        raise ConfigError(f"{place}: is not empty (it holds {other}); give a new or empty folder")


def _merge(place: Path, plan: Plan) -> Manifest:
    """The manifest of a set of which all shards are there, written."""
    shards = {name: tuple(_made(place, plan, plan.files(name))) for name in plan.splits}
    indexes: dict[str, Entry] = {}
    for name, split in plan.splits.items():
        file = place / manifest.index_file(name)
        if not file.exists():
            raise ConfigError(f"{file}: missing; bring it from another host, or run `vit-dist prepare` again")
        indexes[name] = Entry(file.name, split.records, *measure(file))
    whole = Manifest(plan, indexes, shards)
    for name in plan.splits:
        read_index(place, whole, name)
    folder = os.open(place, os.O_RDONLY)
    os.fsync(folder)  # the names that the manifest vouches for are on the disk before it is
    os.close(folder)
    manifest.write_manifest(place, whole)
    _tidy(place)
    return whole


def _made(place: Path, plan: Plan, files: Sequence[str]) -> list[Entry]:
    """What was written down of these shards. Raises `ConfigError` naming the first that is not finished."""
    found = {file: manifest.read_part(place, plan, file) for file in files}
    missing = [file for file, entry in found.items() if entry is None]
    if missing:
        raise ConfigError(
            f"{place}: {len(missing)} of {len(files)} shards are not finished, the first is {missing[0]}; run "
            f"`vit-dist prepare` for them, or bring them from the host that did, with what it has in {manifest.PARTS}"
        )
    return [entry for entry in found.values() if entry is not None]


def _check_finished(place: Path, whole: Manifest) -> None:
    """Raises `ConfigError` where a file of a finished set is missing or cut."""
    for file in [*whole.indexes.values(), *whole.all_shards]:
        check_size(place, file)
    _log.info("%s: already finished", place)
    _tidy(place)


def _tidy(place: Path) -> None:
    """Removes from a finished set what its making, or a run that was killed, left; and nothing else."""
    for file in _within(place / manifest.PARTS):
        if manifest.is_part(file.name):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody's files are in it
        (place / manifest.PARTS).rmdir()
    for entry in place.glob(".*.tmp"):
        if entry.name.startswith((f".{manifest.MANIFEST}.", *(f".{file.name}." for file in place.glob("*.index.npz")))):
            entry.unlink(missing_ok=True)


def _within(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _result_of_range(plan: Plan, shards: Sequence[Entry]) -> dict[str, Any]:
    digest = hashlib.sha256("".join([plan.digest, *(shard.sha256 for shard in shards)]).encode()).hexdigest()
    return manifest.totals(plan, shards, digest)
