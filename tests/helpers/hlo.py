"""The collectives of a compiled program, told by the mesh axes they run over and the loops they are in.

XLA writes who talks to whom as groups of partition numbers, which are places in the mesh, counted row by row. The axes
along which the members of a group differ are the axes of the collective. The groups come in three forms: a list, a
transposed range (`[4,2]<=[2,4]T(1,0)`), and the axes of a mesh of XLA's own making, whose names mean nothing to us.
"""

import collections
import dataclasses
import re

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY\s+)?%?(?P<name>[\w.\-]+)\s*\(.*\{\s*$")
_COLLECTIVE = re.compile(rf"\s=\s(?P<type>.*?)\s(?P<kind>{'|'.join(KINDS)})(-start)?\(")
_CALL = re.compile(
    r"(?P<how>calls|to_apply|condition|body|branch_computations|true_computation|false_computation)="
    r"(?:\{(?P<many>[^}]*)\}|%?(?P<one>[\w.\-]+))"
)
_GROUPS = re.compile(r"replica_groups=\{(?P<groups>(\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[(?P<shape>[\d,]+)\]<=\[(?P<dims>[\d,]+)\](T\((?P<order>[\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\]"
    r"(, device_ids=\(\[(?P<dims>[\d,]+)\](T\((?P<order>[\d,]+)\))?\))? \{(?P<over>[^}]*)\}"
)
_AXIS = re.compile(r"'(?P<name>[^']+)'(=(?P<size>\d+)|:\((?P<before>\d+)\)(?P<part>\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(?P<groups>(\{\d+,\d+\},?)*)\}")
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<shape>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str  # one of `KINDS`
    axes: tuple[str, ...]  # of the mesh, outermost first
    bytes: int  # of its result on one device
    loops: int  # while loops around it: 1 is the body of a loop, 2 that of a loop in a loop


def collectives(text, axes):
    """Every collective of a compiled program's text (`compiled.as_text()`); axes: the mesh's names and sizes.

    Raises `ValueError` for groups that are no product of axes.
    """
    found, calls, entry = {}, {}, None
    for line in text.splitlines():
        if (start := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
            name = start["name"]
            found[name], calls[name] = [], []
            entry = name if start["entry"] else entry
        elif line.startswith(" "):
            for call in _CALL.finditer(line):
                loop = call["how"] in ("body", "condition")
                callees = re.findall(r"[\w.\-]+", call["many"] if call["one"] is None else call["one"])
                calls[name] += [(callee, loop) for callee in callees]
            if match := _COLLECTIVE.search(line):
                found[name].append((match["kind"], axes_of(line, axes), _size(match["type"])))
    depths = _depths(calls, entry)
    return [Collective(*one, depths[name]) for name, several in found.items() if name in depths for one in several]


def axes_of(line, axes):
    """The mesh axes that a collective's line says it runs over."""
    places = np.arange(np.prod(list(axes.values()))).reshape(tuple(axes.values()))
    if pairs := _PAIRS.search(line):
        return _varying(_lists(pairs["groups"]), axes)
    groups = _replica_groups(line) or [places.ravel().tolist()]
    over = _varying(groups, axes)
    product = _groups(places, list(axes), over)
    if {frozenset(group) for group in groups} != {frozenset(group) for group in product}:
        raise ValueError(f"groups {groups} are no product of the axes of {axes}")
    return over


def _replica_groups(line):
    if iota := _IOTA.search(line):
        return _range(iota["dims"], iota["order"]).reshape(_numbers(iota["shape"])).tolist()
    if mesh := _MESH.search(line):
        sizes = {axis["name"]: int(axis["size"]) for axis in _AXIS.finditer(mesh["sizes"])}
        over = [axis["name"] for axis in _AXIS.finditer(mesh["over"]) if not axis["part"]]
        if mesh["over"].count("'") != 2 * len(over):
            raise ValueError(f"part of an axis, which cannot be read yet, in: {mesh[0]}")
        numbers = _range(mesh["dims"] or str(np.prod(list(sizes.values()))), mesh["order"])
        return _groups(numbers.reshape(tuple(sizes.values())), list(sizes), over)
    if groups := _GROUPS.search(line):
        return _lists(groups["groups"])
    raise ValueError(f"no groups that can be read in: {line.strip()[:300]}")


def _range(dims, order):
    """0, 1, 2, ... in an array of `dims`, its axes then put in `order`, where there is one."""
    shape = _numbers(dims)
    return np.arange(np.prod(shape)).reshape(shape).transpose(_numbers(order) if order else range(len(shape)))


def _groups(places, axes, over):
    """The numbers in `places`, whose dimensions are `axes`, that differ along the axes `over` only, group by group."""
    order = [i for i, axis in enumerate(axes) if axis not in over] + [axes.index(axis) for axis in over]
    members = int(np.prod([places.shape[axes.index(axis)] for axis in over]))
    return places.transpose(order).reshape(-1, members).tolist()


def _varying(groups, axes):
    """The axes along which the members of some group differ."""
    spread = [np.ptp(np.unravel_index(group, tuple(axes.values())), axis=1) for group in groups]
    return tuple(axis for axis, differs in zip(axes, np.any(spread, axis=0), strict=True) if differs)


def _depths(calls, entry):
    """Computation -> the most loops around it, for all that the entry reaches."""
    depths, queue = {entry: 0}, collections.deque([entry])
    while queue:
        caller = queue.popleft()
        for callee, loop in calls[caller]:
            depth = depths[caller] + loop
            if depth > depths.get(callee, -1):
                depths[callee] = depth
                queue.append(callee)
    return depths


def _size(text):
    arrays = (one for one in _ARRAY.finditer(text) if one["dtype"] in _BYTES)
    return sum(_BYTES[one["dtype"]] * int(np.prod(_numbers(one["shape"]))) for one in arrays)


def _lists(text):
    return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", text)]


def _numbers(text):
    return [int(number) for number in text.split(",") if number]
