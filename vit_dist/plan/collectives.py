"""Finds the collectives of a compiled program: their kinds, mesh axes, bytes, and executions in a step.

XLA writes which devices communicate as groups of partition numbers, which count the devices of the mesh row by row.
The axes along which the members of a group differ are the axes of the collective. The groups have three formats: a
list, a transposed range (`[4,2]<=[2,4]T(1,0)`), and axes of a mesh that XLA made itself, whose names differ from those
of the config's mesh.

Compilers rewrite some collectives. On a TPU a collective that overlaps with products is cut into pieces in several
fusions, and a reduce-scatter is a fusion of an all-reduce with a slice of its result. Between TPU slices there are no
collective instructions: each slice sends to its host, and the hosts sum and forward. Partitions are then numbered
within a slice.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vit_dist.plan import hlo

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BETWEEN_SLICES = "dcn_data"  # the axis of the mesh that crosses from one TPU slice to another

_GROUPS = re.compile(r"replica_groups=\{(?P<groups>(\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[(?P<shape>[\d,]+)\]<=\[(?P<dims>[\d,]+)\](T\((?P<order>[\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\]"
    r"(, device_ids=\(\[(?P<dims>[\d,]+)\](T\((?P<order>[\d,]+)\))?\))? \{(?P<over>[^}]*)\}"
)
_AXIS = re.compile(r"'(?P<name>[^']+)'(=(?P<size>\d+)|:\((?P<before>\d+)\)(?P<subaxis>\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(?P<groups>(\{\d+,\d+\},?)*)\}")
_PIECE = re.compile(r'\bchannel_id=(?P<channel>\d+),.*\bchain_id="(?P<chain>\d+)"')
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(?P<type>\w+)"')
_TRANSFERS = {"ALL_REDUCE": "all-reduce", "ONE_TO_ONE": "collective-permute"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """A communication between devices in a training step."""

    kind: str  # a member of `KINDS`
    axes: tuple[str, ...]  # of the mesh, outermost first
    bytes: int  # of the unsplit array in one execution: the result, or the operand of a reduce-scatter
    count: int  # executions in a step
    loops: int  # number of loops around it


class Located(NamedTuple):
    """A collective and where it is in the program's text."""

    computation: str
    instruction: hlo.Instruction  # its second half if it has two; its first piece if it has several
    collective: Collective


def collectives(text: str, axes: Mapping[str, int]) -> list[Collective]:
    """Returns every collective of a compiled program.

    Args:
      text: `compiled.as_text()`.
      axes: names and sizes of the mesh's axes, outermost first.

    Raises:
      ValueError: a collective cannot be read, for example because its groups are not a product of axes.
    """
    return [located.collective for located in locate(hlo.parse(text), axes)]


def locate(program: hlo.HloModule, axes: Mapping[str, int]) -> Iterator[Located]:
    """Yields every collective of a parsed program with its place. For the arguments and errors see `collectives`."""
    partition_axes = _partition_axes(program, axes)
    pieces = set()
    for name, executions in program.executions().items():
        computation = program.computations[name]
        for instruction in computation.values():
            if piece := piece_of(instruction):
                if piece in pieces:
                    continue
                pieces.add(piece)
            if collective := _read(instruction, computation, partition_axes):
                yield Located(name, instruction, Collective(*collective, executions.count, executions.loops))


def piece_of(instruction: hlo.Instruction) -> tuple[str, str] | None:
    """Returns what all pieces of the same collective have in common; None for what is not a piece."""
    piece = _PIECE.search(instruction.line)
    return (piece["channel"], piece["chain"]) if piece else None


def _read(
    instruction: hlo.Instruction, computation: hlo.Computation, axes: Mapping[str, int]
) -> tuple[str, tuple[str, ...], int] | None:
    """Returns (kind, axes, bytes) of a collective, None for any other instruction.

    An asynchronous collective is counted at its second half: the type of the first half may hold the operand beside the
    result, depending on platform and version.
    """
    if instruction.opcode == "send" and (transfer := _TRANSFER.search(instruction.line)):
        if transfer["type"] not in _TRANSFERS:
            raise ValueError(f"a send between slices of an unknown type: {transfer['type']}")
        return _TRANSFERS[transfer["type"]], (BETWEEN_SLICES,), computation[instruction.operands[0]].bytes
    kind, size = instruction.opcode.removesuffix("-done"), instruction.bytes
    if kind not in KINDS:
        return None
    start = instruction if instruction.opcode == kind else computation[instruction.operands[0]]
    over = collective_axes(start.line, axes)
    if kind == "reduce-scatter":
        size *= math.prod(axes[axis] for axis in over)
    if kind == "all-reduce" and _is_scattered(computation, instruction):
        kind = "reduce-scatter"
    return kind, over, size


def bytes_sent(collective: Collective, members: int) -> float:
    """Returns the bytes that one of `members` devices sends in one execution around a ring.

    An all-reduce is a reduce-scatter and an all-gather: 2 (n - 1) / n of the array (Patarasuk and Yuan 2009, "Bandwidth
    optimal all-reduce algorithms for clusters of workstations").
    """
    if collective.kind in ("collective-permute", "collective-broadcast"):
        return collective.bytes
    rounds = 2 if collective.kind == "all-reduce" else 1
    return rounds * (members - 1) / members * collective.bytes


def collective_axes(line: str, axes: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes of a collective from the line of its instruction. Raises `ValueError` as `collectives`."""
    partitions = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
    if pairs := _PAIRS.search(line):
        return _varying(_lists(pairs["groups"]), axes)
    groups = _replica_groups(line) or [partitions.ravel().tolist()]
    over = _varying(groups, axes)
    product = _groups(partitions, list(axes), over)
    if {frozenset(group) for group in groups} != {frozenset(group) for group in product}:
        raise ValueError(f"groups {groups} are not groups along axes of {dict(axes)}")
    return over


def _partition_axes(program: hlo.HloModule, axes: Mapping[str, int]) -> dict[str, int]:
    """Returns the axes whose product is the program's partitions: all axes, or those within a TPU slice."""
    within_slice = {axis: size for axis, size in axes.items() if axis != BETWEEN_SLICES}
    for candidate in (dict(axes), within_slice):
        if program.partitions == math.prod(candidate.values()):
            return candidate
    raise ValueError(f"a program of {program.partitions} partitions is for another mesh than {dict(axes)}")


def _is_scattered(computation: hlo.Computation, reduction: hlo.Instruction) -> bool:
    """Whether a fusion returns only this device's slice of an all-reduce."""
    root = computation.root
    while root.opcode == "bitcast":
        root = computation[root.operands[0]]
    return root.opcode == "dynamic-slice" and root.operands[0] == reduction.name


def _replica_groups(line: str) -> list[list[int]]:
    if iota := _IOTA.search(line):
        return _range(iota["dims"], iota["order"]).reshape(_numbers(iota["shape"])).tolist()
    if mesh := _MESH.search(line):
        sizes = {axis["name"]: int(axis["size"]) for axis in _AXIS.finditer(mesh["sizes"])}
        over = [axis["name"] for axis in _AXIS.finditer(mesh["over"]) if not axis["subaxis"]]
        if mesh["over"].count("'") != 2 * len(over):
            raise ValueError(f"groups over a part of an axis cannot be read yet: {mesh[0]}")
        numbers = _range(mesh["dims"] or str(math.prod(sizes.values())), mesh["order"])
        return _groups(numbers.reshape(tuple(sizes.values())), list(sizes), over)
    if groups := _GROUPS.search(line):
        return _lists(groups["groups"])
    raise ValueError(f"no groups can be read in: {line.strip()[:300]}")


def _range(dims: str, order: str | None) -> np.ndarray:
    """Returns 0, 1, 2, ... as an array of shape `dims`, transposed by `order` if there is one."""
    shape = _numbers(dims)
    return np.arange(math.prod(shape)).reshape(shape).transpose(_numbers(order) if order else range(len(shape)))


def _groups(partitions: np.ndarray, axes: Sequence[str], over: Sequence[str]) -> list[list[int]]:
    """Returns the groups of partition numbers whose members differ along the axes `over` only.

    `axes` are the names of the dimensions of `partitions`.
    """
    order = [i for i, axis in enumerate(axes) if axis not in over] + [axes.index(axis) for axis in over]
    members = math.prod(partitions.shape[axes.index(axis)] for axis in over)
    return partitions.transpose(order).reshape(-1, members).tolist()


def _varying(groups: Sequence[Sequence[int]], axes: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the axes along which the members of any group differ."""
    spread = [np.ptp(np.unravel_index(group, tuple(axes.values())), axis=1) for group in groups]
    return tuple(axis for axis, differs in zip(axes, np.any(spread, axis=0), strict=True) if differs)


def _lists(text: str) -> list[list[int]]:
    return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", text)]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
