"""What `prepare` writes down of a set of records: its plan while it works, and its manifest once the set is whole.

The plan follows from the source and the options alone, so that several hosts, and the runs before and after a kill,
make the same one without a word between them. The manifest is the plan and what became of each shard; it is written
last, and a folder without one is no set.
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
PARTS = ".vit_dist_parts"  # the folder of a set's unfinished business
PLAN = f"{PARTS}/plan.json"
# Raise it whenever the same source and options come to make other records: an encoder or a resizer that rounds
# otherwise. Half a set of each would pass for one.
_FORMAT = "vit_dist records 2"
_PART = re.compile(r"\.?(plan\.json|.+\.array_record(\.json)?)(\.\w+\.tmp)?")


@dataclasses.dataclass(frozen=True)
class Split:
    """A split as planned. Shard `s` of its S holds the N records of ids `s * N // S` to `(s + 1) * N // S`."""

    records: int
    shards: int
    fingerprint: str  # of the split as it is listed (`array_record.fingerprint_of`)
    sample: str  # of some of the source's images (`recognise.sample`): names and labels may outlive a change of them
    version: str  # how its images differ from the first source's, for `FileSource.version`

    def ids(self, shard: int) -> range:
        return range(shard * self.records // self.shards, (shard + 1) * self.records // self.shards)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be made: the options, the classes and the splits."""

    resize: int | None
    encode: str | None
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    format: str = _FORMAT

    def files(self, split: str) -> list[str]:
        """The names of a split's shards, such as `train-00003-of-00016.array_record`."""
        count = self.splits[split].shards
        return [f"{split}-{number:05d}-of-{count:05d}.array_record" for number in range(count)]

    @property
    def digest(self) -> str:
        return _digest(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A shard, or the index of a split (of as many records), as it lies on the disk."""

    file: str
    records: int
    bytes: int
    sha256: str
    bad: int = 0  # images that were to be decoded, could not be, and were kept as they were


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A whole set: its plan, and its files by split, the shards in order."""

    plan: Plan
    indexes: Mapping[str, Entry]
    shards: Mapping[str, tuple[Entry, ...]]

    @property
    def digest(self) -> str:
        """Of the whole set: the same wherever, by how many hosts and however often interrupted it was made."""
        return _digest(dataclasses.asdict(self))

    @property
    def all_shards(self) -> list[Entry]:
        """Those of all splits."""
        return [shard for shards in self.shards.values() for shard in shards]

    def result(self) -> dict[str, Any]:
        """What `prepare` prints of a whole set."""
        return totals(self.plan, self.all_shards, self.digest)


def totals(plan: Plan, shards: Sequence[Entry], digest: str) -> dict[str, Any]:
    """What `prepare` prints of these shards of a set. `bad` is None where no image was decoded, so nobody knows."""
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


def is_part(name: str) -> bool:
    """Whether a file in the folder of parts is one that the making of a set leaves there."""
    return _PART.fullmatch(name) is not None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a whole set. Raises `ConfigError` where the folder holds none, or one that was changed."""
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
        indexes = {name: Entry(**one) for name, one in values["indexes"].items()}
        shards = {name: tuple(Entry(**one) for one in some) for name, some in values["shards"].items()}
        manifest = Manifest(plan, indexes, shards)
        whole = manifest.digest == values["digest"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error!r}); prepare the set again") from error
    if not whole:
        raise ConfigError(f"{file}: was changed since it was written: its digest is not {values['digest']}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    _write(folder / MANIFEST, {**dataclasses.asdict(manifest), "digest": manifest.digest})


def read_plan(folder: Path) -> Plan | None:
    """The plan of a set that is being made here, if there is one."""
    values = _read(folder / PLAN)
    try:
        return None if values is None else _plan(folder / PLAN, values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / PLAN}: cannot be read ({error!r}); remove {folder} and begin again") from error


def write_plan(folder: Path, plan: Plan) -> None:
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    _write(folder / PLAN, dataclasses.asdict(plan))


def read_part(folder: Path, plan: Plan, file: str) -> Entry | None:
    """What was written down of a shard, if it is finished. Raises `ConfigError` where another plan made it."""
    part = folder / PARTS / f"{file}.json"
    values = _read(part)
    if values is None:
        return None
    try:
        planned, shard = values.pop("plan"), Entry(**values)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{part}: cannot be read ({error!r}); remove it and prepare its shard again") from error
    if planned != plan.digest:
        raise ConfigError(f"{part}: of another set than {folder / PLAN}; prepare its shards with the same options")
    try:
        size = (folder / file).stat().st_size
    except FileNotFoundError:
        return None
    return shard if size == shard.bytes else None


def write_part(folder: Path, plan: Plan, shard: Entry) -> None:
    _write(folder / PARTS / f"{shard.file}.json", {**dataclasses.asdict(shard), "plan": plan.digest})


def differences(old: Plan, new: Plan) -> str:
    """What two plans say differently, in words."""
    a, b = (flatten(dataclasses.asdict(plan)) for plan in (old, new))
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return ", ".join(f"{key} was {_short(a.get(key))}, now {_short(b.get(key))}" for key in keys[:4])


def _short(value: Any) -> str:
    return f"{len(value)} names" if isinstance(value, tuple) else str(value)


def _plan(file: Path, values: Mapping[str, Any]) -> Plan:
    if values["format"] != _FORMAT:
        raise ConfigError(f"{file}: of the format {values['format']!r}, expected {_FORMAT!r}; prepare the set again")
    splits = {name: Split(**one) for name, one in values["splits"].items()}
    return Plan(values["resize"], values["encode"], tuple(values["classes"]), splits)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file, if there is one."""
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{file}: cannot be read ({error}); remove it and prepare the set again") from error
    return values if isinstance(values, dict) else None


def _write(file: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object whole or not at all."""
    with replacing(file) as stream:
        stream.write(json.dumps(values, indent=1).encode())
