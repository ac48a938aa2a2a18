"""The collectives of a compiled program: which, over which axes of the mesh, how many bytes and how often a step.

XLA writes which devices communicate as groups of partition numbers, which count the devices of the mesh row by row.
The axes along which the members of a group differ are the axes of the collective. The groups come in three forms: a
list, a transposed range (`[4,2]<=[2,4]T(1,0)`), and the axes of a mesh that XLA made itself, whose names mean nothing
to us.

Compilers disguise some of them. On a TPU a collective that runs beside products is cut into pieces that lie in several
fusions, and a reduce-scatter is a fusion of an all-reduce with the slice that is kept. Between slices there are no
collectives at all but sends to the host, which sums and passes on; partitions are then numbered within a slice.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

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
_AXIS = re.compile(r"'(?P<name>[^']+)'(=(?P<size>\d+)|:\((?P<before>\d+)\)(?P<part>\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(?P<groups>(\{\d+,\d+\},?)*)\}")
_PIECE = re.compile(r'\bchannel_id=(?P<channel>\d+),.*\bchain_id="(?P<chain>\d+)"')
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(?P<type>\w+)"')
_TRANSFERS = {"ALL_REDUCE": "all-reduce", "ONE_TO_ONE": "collective-permute"}


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str  # one of `KINDS`
    axes: tuple[str, ...]  # of the mesh, outermost first
    bytes: int  # of the whole array in one execution: the result, or a reduce-scatter's operand
    count: int  # executions a step
    loops: int  # loops around it: 1 is the body of a loop, 2 that of a loop in a loop


def collectives(text: str, axes: Mapping[str, int]) -> list[Collective]:
    """Every collective of a compiled program's text (`compiled.as_text()`); axes: the mesh's names and sizes.

    Raises `ValueError` for what cannot be read, such as groups that are no product of axes.
    """
    program = hlo.read(text)
    own = _axes_of_partitions(program, axes)
    found, pieces = [], set()
    for name, runs in program.runs().items():
        computation = program.computations[name]
        for instruction in computation.values():
            if piece := _PIECE.search(instruction.line):
                if piece.groups() in pieces:
                    continue
                pieces.add(piece.groups())
            if said := _said(instruction, computation, own):
                found.append(Collective(*said, runs.times, runs.loops))
    return found


def _said(
    instruction: hlo.Instruction, computation: hlo.Computation, axes: Mapping[str, int]
) -> tuple[str, tuple[str, ...], int] | None:
    """(kind, axes, bytes) of a collective; None of any other instruction, and of the first half of an asynchronous one.

    The second half says the result alone: the first has, by platform and version, the operand beside it.
    """
    if instruction.opcode == "send" and (transfer := _TRANSFER.search(instruction.line)):
        if transfer["type"] not in _TRANSFERS:
            raise ValueError(f"a send between slices of an unknown type: {transfer['type']}")
        return _TRANSFERS[transfer["type"]], (BETWEEN_SLICES,), computation[instruction.operands[0]].bytes
    kind, size = instruction.opcode.removesuffix("-done"), instruction.bytes
    if kind not in KINDS:
        return None
    start = instruction if instruction.opcode == kind else computation[instruction.operands[0]]
    over = axes_of(start.line, axes)
    if kind == "reduce-scatter":
        size *= math.prod(axes[axis] for axis in over)
    if kind == "all-reduce" and _is_scattered(computation, instruction):
        kind = "reduce-scatter"
    return kind, over, size


def sent(collective: Collective, members: int) -> float:
    """Bytes that leave one device in one execution among so many, passed on around a ring.

    All-reduce is a reduce-scatter and an all-gather: 2 (n - 1) / n of the array (Patarasuk and Yuan 2009, "Bandwidth
    optimal all-reduce algorithms for clusters of workstations").
    """
    if collective.kind in ("collective-permute", "collective-broadcast"):
        return collective.bytes
    rounds = 2 if collective.kind == "all-reduce" else 1
    return rounds * (members - 1) / members * collective.bytes


def axes_of(line: str, axes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that a collective's line says it runs over."""
    places = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
    if pairs := _PAIRS.search(line):
        return _varying(_lists(pairs["groups"]), axes)
    groups = _replica_groups(line) or [places.ravel().tolist()]
    over = _varying(groups, axes)
    product = _groups(places, list(axes), over)
    if {frozenset(group) for group in groups} != {frozenset(group) for group in product}:
        raise ValueError(f"groups {groups} are no product of the axes of {dict(axes)}")
    return over


def _axes_of_partitions(program: hlo.HloModule, axes: Mapping[str, int]) -> dict[str, int]:
    """The axes that the program's partitions fill: all, or those within one slice."""
    within = {axis: size for axis, size in axes.items() if axis != BETWEEN_SLICES}
    for one in (dict(axes), within):
        if program.partitions == math.prod(one.values()):
            return one
    raise ValueError(f"a program of {program.partitions} partitions is for another mesh than {dict(axes)}")


def _is_scattered(computation: hlo.Computation, reduction: hlo.Instruction) -> bool:
    """Whether a fusion keeps nothing of an all-reduce but this device's slice."""
    root = computation.root
    while root.opcode == "bitcast":
        root = computation[root.operands[0]]
    return root.opcode == "dynamic-slice" and root.operands[0] == reduction.name


def _replica_groups(line: str) -> list[list[int]]:
    if iota := _IOTA.search(line):
        return _range(iota["dims"], iota["order"]).reshape(_numbers(iota["shape"])).tolist()
    if mesh := _MESH.search(line):
        sizes = {axis["name"]: int(axis["size"]) for axis in _AXIS.finditer(mesh["sizes"])}
        over = [axis["name"] for axis in _AXIS.finditer(mesh["over"]) if not axis["part"]]
        if mesh["over"].count("'") != 2 * len(over):
            raise ValueError(f"part of an axis, which cannot be read yet, in: {mesh[0]}")
        numbers = _range(mesh["dims"] or str(math.prod(sizes.values())), mesh["order"])
        return _groups(numbers.reshape(tuple(sizes.values())), list(sizes), over)
    if groups := _GROUPS.search(line):
        return _lists(groups["groups"])
    raise ValueError(f"no groups that can be read in: {line.strip()[:300]}")


def _range(dims: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in an array of `dims`, its axes then put in `order`, where there is one."""
    shape = _numbers(dims)
    return np.arange(math.prod(shape)).reshape(shape).transpose(_numbers(order) if order else range(len(shape)))


def _groups(places: np.ndarray, axes: Sequence[str], over: Sequence[str]) -> list[list[int]]:
    """The numbers in `places`, whose dimensions are `axes`, that differ along the axes `over` only, group by group."""
    order = [i for i, axis in enumerate(axes) if axis not in over] + [axes.index(axis) for axis in over]
    members = math.prod(places.shape[axes.index(axis)] for axis in over)
    return places.transpose(order).reshape(-1, members).tolist()


def _varying(groups: Sequence[Sequence[int]], axes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the members of some group differ."""
    spread = [np.ptp(np.unravel_index(group, tuple(axes.values())), axis=1) for group in groups]
    return tuple(axis for axis, differs in zip(axes, np.any(spread, axis=0), strict=True) if differs)


def _lists(text: str) -> list[list[int]]:
    return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", text)]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
