"""What `prepare` writes down of a set of records: its plan while it works, and its manifest once the set is whole.

The plan follows from the source and the options alone, so that several hosts, and the runs before and after a kill,
make the same one without a word between them. The manifest is the plan and what became of each shard; it is written
last, and a folder without one is no set.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vit_dist.config import ConfigError, flatten
from vit_dist.data.files import replacing

MANIFEST = "manifest.json"
PARTS = "parts"  # the folder of a set's unfinished business
PLAN = f"{PARTS}/plan.json"
_FORMAT = "vit_dist records 1"


@dataclasses.dataclass(frozen=True)
class Split:
    """A split as planned. Shard `s` of its S holds the N records of ids `s * N // S` to `(s + 1) * N // S`."""

    records: int
    shards: int
    fingerprint: str  # of the source's split (`examples.fingerprint`)
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
class File:
    """A shard, or the index of a split (of as many records), as it lies on the disk."""

    file: str
    records: int
    bytes: int
    sha256: str
    bad: int = 0  # images that did not decode and were kept as they were


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A whole set: its plan, and its files by split, the shards in order."""

    plan: Plan
    indexes: Mapping[str, File]
    shards: Mapping[str, tuple[File, ...]]

    @property
    def digest(self) -> str:
        """Of the whole set: the same wherever, by how many hosts and however often interrupted it was made."""
        return _digest(dataclasses.asdict(self))

    def result(self) -> dict[str, Any]:
        """What `prepare` prints of a whole set."""
        return result(self.plan, [shard for shards in self.shards.values() for shard in shards], self.digest)


def result(plan: Plan, shards: Iterable[File], digest: str) -> dict[str, Any]:
    """What `prepare` prints of these shards of a set."""
    shards = list(shards)
    return {
        "records": sum(shard.records for shard in shards),
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "digest": digest,
        "splits": {name: split.records for name, split in plan.splits.items()},
        "classes": len(plan.classes),
        "bad": sum(shard.bad for shard in shards),
    }


def index_file(split: str) -> str:
    return f"{split}.index.npz"


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
        plan = _plan(values["plan"])
        indexes = {name: File(**one) for name, one in values["indexes"].items()}
        shards = {name: tuple(File(**one) for one in some) for name, some in values["shards"].items()}
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
        return None if values is None else _plan(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / PLAN}: cannot be read ({error!r}); remove {folder} and begin again") from error


def write_plan(folder: Path, plan: Plan) -> None:
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    _write(folder / PLAN, dataclasses.asdict(plan))


def read_part(folder: Path, plan: Plan, file: str) -> File | None:
    """What was written down of a shard, if it is finished. Raises `ConfigError` where another plan made it."""
    part = folder / PARTS / f"{file}.json"
    values = _read(part)
    if values is None:
        return None
    if values.pop("plan") != plan.digest:
        raise ConfigError(f"{part}: of another set than {folder / PLAN}; prepare its shards with the same options")
    shard = File(**values)
    try:
        size = (folder / file).stat().st_size
    except FileNotFoundError:
        return None
    return shard if size == shard.bytes else None


def write_part(folder: Path, plan: Plan, shard: File) -> None:
    _write(folder / PARTS / f"{shard.file}.json", {**dataclasses.asdict(shard), "plan": plan.digest})


def differences(old: Plan, new: Plan) -> str:
    """What two plans say differently, in words."""
    a, b = (flatten(dataclasses.asdict(plan)) for plan in (old, new))
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return ", ".join(f"{key} was {_short(a.get(key))}, now {_short(b.get(key))}" for key in keys[:4])


def _short(value: Any) -> str:
    return f"{len(value)} names" if isinstance(value, tuple) else str(value)


def _plan(values: Mapping[str, Any]) -> Plan:
    if values["format"] != _FORMAT:
        raise ConfigError(f"a set of the format {values['format']!r}, where {_FORMAT!r} is read; prepare it again")
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
