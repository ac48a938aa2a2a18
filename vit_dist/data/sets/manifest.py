"""The JSON files of a prepared set of records: its plan while `prepare` works, its manifest once the set is complete.

The plan depends only on the source and the options, so several hosts, and a run before and after a kill, make the same
plan without communicating. The manifest is the plan and an entry for each shard. It is written last: a folder without
a manifest is not a set.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.data.files import replacing
from vit_dist.schema import flatten

MANIFEST = "manifest.json"
WORK_FOLDER = ".vit_dist_parts"  # the folder, inside an unfinished set, of the files that `prepare` needs to resume
PLAN = f"{WORK_FOLDER}/plan.json"
# Raise the number when the same source and options come to give other records, as when an encoder rounds differently.
# Otherwise a set could be made half of old records, half of new ones, and nobody would notice.
_FORMAT = "vit_dist records 2"
_PART_NAME = re.compile(r"\.?(plan\.json|.+\.array_record(\.json)?)(\.\w+\.tmp)?")


@dataclasses.dataclass(frozen=True)
class Split:
    """A split as planned. Of N records in S shards, shard `s` holds the ids `s * N // S` to `(s + 1) * N // S - 1`."""

    records: int
    shards: int
    fingerprint: str  # of its index (`array_record.fingerprint_of`)
    sample: str  # digest of some source images (`recognise.sample`): they may change under the same names and labels
    version: str  # how its images differ from the original source's, for `FileSource.version`

    def ids(self, shard: int) -> range:
        return range(shard * self.records // self.shards, (shard + 1) * self.records // self.shards)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The set that `prepare` is to make: options, classes and splits."""

    resize: int | None
    encode: str | None
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    format: str = _FORMAT

    def files(self, split: str) -> list[str]:
        """Returns the names of a split's shards, such as `train-00003-of-00016.array_record`."""
        count = self.splits[split].shards
        return [f"{split}-{number:05d}-of-{count:05d}.array_record" for number in range(count)]

    @property
    def digest(self) -> str:
        return _digest(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file on the disk: a shard, or the index of a split, and how many records it holds or lists."""

    file: str
    records: int
    bytes: int
    sha256: str
    bad: int = 0  # images that did not decode and were kept unchanged


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A complete set: its plan, and its files by split, the shards in order."""

    plan: Plan
    indexes: Mapping[str, Entry]
    shards: Mapping[str, tuple[Entry, ...]]

    @property
    def digest(self) -> str:
        """The digest of the set: the same however many hosts made it, and however often they were interrupted."""
        return _digest(dataclasses.asdict(self))

    @property
    def all_shards(self) -> list[Entry]:
        """The shards of all splits."""
        return [shard for shards in self.shards.values() for shard in shards]

    def result(self) -> dict[str, Any]:
        """Returns the JSON object that `prepare` prints for a complete set."""
        return totals(self.plan, self.all_shards, self.digest)


def totals(plan: Plan, shards: Sequence[Entry], digest: str) -> dict[str, Any]:
    """Returns the JSON object that `prepare` prints for these shards. `bad` is None if no image was decoded."""
    return {
        "records": sum(shard.records for shard in shards),
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "digest": digest,
        "splits": {name: split.records for name, split in plan.splits.items()},
        "classes": len(plan.classes),
        "bad": None if plan.encode is None else sum(shard.bad for shard in shards),
    }


def index_file(split: str) -> str:
    return f"{split}.index.npz"


def is_work_file(name: str) -> bool:
    """Returns whether a file in the folder `WORK_FOLDER` has a name that `prepare` gives."""
    return _PART_NAME.fullmatch(name) is not None


def read_manifest(folder: Path) -> Manifest:
    """Returns the manifest of a complete set. Raises `ConfigError` if there is none, or it was changed."""
    file = folder / MANIFEST
    values = _read(file)
    if values is None:
        if (folder / PLAN).exists():
            raise ConfigError(f"{folder}: not finished; run `vit-dist prepare` on it again, or with --merge")
        if (folder / "dataset_info.json").exists():
            raise ConfigError(f"{folder}: a set of tensorflow-datasets; set data.source=tfds")
        raise ConfigError(f"{folder}: no {MANIFEST} in it; expected a folder that `vit-dist prepare` made")
    try:
        plan = _plan(file, values["plan"])
        indexes = {split: Entry(**entry) for split, entry in values["indexes"].items()}
        shards = {split: tuple(Entry(**entry) for entry in listed) for split, listed in values["shards"].items()}
        manifest = Manifest(plan, indexes, shards)
        if manifest.digest == values["digest"]:
            return manifest
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error!r}); prepare the set again") from error
    raise ConfigError(f"{file}: was changed since it was written: its digest is not {values['digest']}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    _write(folder / MANIFEST, {**dataclasses.asdict(manifest), "digest": manifest.digest})


def read_plan(folder: Path) -> Plan | None:
    """Returns the plan of an unfinished set, or None if there is none."""
    values = _read(folder / PLAN)
    try:
        return None if values is None else _plan(folder / PLAN, values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / PLAN}: cannot be read ({error!r}); remove {folder} and begin again") from error


def write_plan(folder: Path, plan: Plan) -> None:
    (folder / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    _write(folder / PLAN, dataclasses.asdict(plan))


def read_entry(folder: Path, plan: Plan, file: str) -> Entry | None:
    """Returns the entry of a shard if it is finished, else None. Raises `ConfigError` if it belongs to another plan."""
    path = folder / WORK_FOLDER / f"{file}.json"
    values = _read(path)
    if values is None:
        return None
    try:
        plan_digest, shard = values.pop("plan"), Entry(**values)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error!r}); remove it and prepare its shard again") from error
    if plan_digest != plan.digest:
        raise ConfigError(f"{path}: of another set than {folder / PLAN}; prepare its shards with the same options")
    return shard if stored_size(folder / file) == shard.bytes else None


def stored_size(file: Path) -> int | None:
    """Returns the size of a file in bytes, or None if there is none."""
    try:
        return file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_entry(folder: Path, plan: Plan, shard: Entry) -> None:
    _write(folder / WORK_FOLDER / f"{shard.file}.json", {**dataclasses.asdict(shard), "plan": plan.digest})


def differences(old: Plan, new: Plan) -> str:
    """Returns the differences between two plans as text for an error message: 'resize was 32, now 64'."""
    a, b = (flatten(dataclasses.asdict(plan)) for plan in (old, new))
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return ", ".join(f"{key} was {_short(a.get(key))}, now {_short(b.get(key))}" for key in keys[:4])


def _short(value: Any) -> str:
    return f"{len(value)} names" if isinstance(value, tuple) else str(value)


def _plan(file: Path, values: Mapping[str, Any]) -> Plan:
    if values["format"] != _FORMAT:
        raise ConfigError(f"{file}: of the format {values['format']!r}, expected {_FORMAT!r}; prepare the set again")
    splits = {name: Split(**split) for name, split in values["splits"].items()}
    return Plan(values["resize"], values["encode"], tuple(values["classes"]), splits)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read(file: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file, or None if the file is missing or holds something else."""
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); remove it and prepare the set again") from error
    return values if isinstance(values, dict) else None


def _write(file: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically."""
    with replacing(file) as stream:
        stream.write(json.dumps(values, indent=1).encode())
