"""A compiled program's text (`compiled.as_text()`) taken apart: computations, their instructions, how often each runs.

The text is what XLA's compilers for CPU, GPU and TPU have in common. A computation is a list of instructions; the entry
calls others as the bodies of loops, as fusions (many instructions that run as one) and as branches. One rule of the
text is relied upon: a computation is printed after all that it calls.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(?P<entry>ENTRY\s+)?%?(?P<name>[\w.\-]+)\s*\(.*\{\s*$")
# The type comes before the first word that a bracket follows: brackets within types have no word before them.
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) ?\b(?P<opcode>[a-z][a-z0-9\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]\w*)\[(?P<shape>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?")
_BITS = re.compile(r"\d+")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLS = re.compile(
    r"\b(?P<how>calls|to_apply|condition|body|branch_computations|true_computation|false_computation)="
    r"(?:\{(?P<many>[^}]*)\}|%?(?P<one>[\w.\-]+))"
)
_CALLERS = {"while", "fusion", "call", "conditional", "async-start"}  # a reduction's `to_apply` adds two numbers
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_PARTITIONS = re.compile(r"\bnum_partitions=(\d+)")
_INTEGER = re.compile(r"\bconstant\((-?\d+)\)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result's type, such as `bf16[16,197]{1,0:T(8,128)(2,1)S(1)}`."""

    dtype: str
    shape: tuple[int, ...]
    layout: str  # dimensions from the quickest to the slowest, then a TPU's tiles T(...) and memory S(...)

    @property
    def bytes(self) -> int:
        """Of its elements; 0 for a token."""
        return math.prod(self.shape) * _bits(self.dtype) // 8

    @property
    def stored_bytes(self) -> int:
        """What it takes in memory: a TPU pads the last dimensions to whole tiles."""
        tiles = _TILE.search(self.layout)
        if tiles is None:
            return self.bytes
        tile = _numbers(tiles[1])
        order = [self.shape[dimension] for dimension in reversed(_numbers(self.layout.partition(":")[0]))]
        order = [1] * (len(tile) - len(order)) + order  # slowest first, as the tile is
        kept, tiled = order[: len(order) - len(tile)], order[len(order) - len(tile) :]
        return math.prod(kept) * math.prod(-(-n // t) * t for n, t in zip(tiled, tile)) * _bits(self.dtype) // 8

    @property
    def in_main_memory(self) -> bool:
        """Whether it lies in the device's memory, and not on the chip (a TPU's S(1)) or with the host."""
        space = _SPACE.search(self.layout)
        return space is None or space[1] == "0"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`%name = type opcode(operands), attributes`."""

    name: str
    opcode: str
    operands: tuple[str, ...]  # names of instructions of the same computation
    line: str
    type: str

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Those of the result; several for a tuple."""
        return tuple(
            Array(one["dtype"], tuple(_numbers(one["shape"])), one["layout"] or "")
            for one in _ARRAY.finditer(self.type)
        )

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(array.bytes for array in self.arrays)

    def calls(self) -> Iterator[tuple[str, bool]]:
        """Each computation that it calls, and whether it does so in a loop."""
        if self.opcode in _CALLERS:
            for call in _CALLS.finditer(self.line):
                loop = call["how"] in ("body", "condition")
                for name in re.findall(r"[\w.\-]+", call["many"] if call["one"] is None else call["one"]):
                    yield name, loop


class Computation(dict[str, Instruction]):
    """Name -> instruction, in the order of the text."""

    root: Instruction


@dataclasses.dataclass(frozen=True)
class Runs:
    """How often a computation runs in one run of the program."""

    times: int  # loops by their trip counts, once where that is not known; each branch as if it were taken
    loops: int  # loops around it
    fused: bool  # part of a fusion: what is within stays on the chip


@dataclasses.dataclass(frozen=True)
class HloModule:
    computations: dict[str, Computation]
    entry: str
    partitions: int  # devices that run it together; of one slice where there are several

    def runs(self) -> dict[str, Runs]:
        """Of every computation that the entry reaches, the entry first."""
        runs = {self.entry: Runs(1, 0, False)}
        for name in reversed(self.computations):
            if name not in runs:
                continue
            own = runs[name]
            for instruction in self.computations[name].values():
                for callee, loop in instruction.calls():
                    before = runs.get(callee, Runs(0, 0, False))
                    runs[callee] = Runs(
                        before.times + own.times * (self._trips(instruction) if loop else 1),
                        max(before.loops, own.loops + loop),
                        before.fused or own.fused or instruction.opcode == "fusion",
                    )
        return runs

    def _trips(self, loop: Instruction) -> int:
        """How often a `while` runs: as the compiler noted, or as its condition says; 1 where neither tells."""
        if noted := _TRIPS.search(loop.line):
            return int(noted[1])
        conditions = (call for call in _CALLS.finditer(loop.line) if call["how"] == "condition")
        return self._bound(self.computations[next(conditions)["one"]]) or 1

    def _bound(self, condition: Computation) -> int | None:
        """n of a condition `i < n`. JAX's loops over a known length count up from 0 by 1."""
        if condition.root.opcode == "fusion":  # as GPUs' compiler has it: a kernel that compares what it is given
            ((compared, _),) = condition.root.calls()
            return self._bound(self.computations[compared])
        if condition.root.opcode != "compare" or "direction=LT" not in condition.root.line:
            return None
        counter, bound = (condition[name] for name in condition.root.operands)
        found = _INTEGER.search(bound.line)
        return int(found[1]) if found and counter.opcode in ("get-tuple-element", "parameter") else None


def read(text: str) -> HloModule:
    """The program of a compiled module's text."""
    computations: dict[str, Computation] = {}
    entry, current = "", Computation()
    for line in text.splitlines():
        if line.startswith(" "):
            if found := _INSTRUCTION.match(line):
                operands = tuple(_NAME.findall(line, found.end(), line.find(")", found.end())))
                instruction = Instruction(found["name"], found["opcode"], operands, line, found["type"])
                current[found["name"]] = instruction
                if found["root"]:
                    current.root = instruction
        elif (found := _HEADER.match(line)) and not line.startswith("HloModule"):
            current = computations[found["name"]] = Computation()
            entry = found["name"] if found["entry"] else entry
    partitions = _PARTITIONS.search(text.partition("\n")[0])
    return HloModule(computations, entry, int(partitions[1]) if partitions else 1)


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    found = _BITS.search(dtype)  # f32, bf16, s8, f8e4m3fn; a token has none
    return int(found[0]) if found else 0


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
