"""Parses the text of a compiled program (`compiled.as_text()`): computations, their instructions, how often each runs.

XLA's compilers for CPU, GPU and TPU share the format of this text. A computation is a list of instructions. The entry
computation calls others as the bodies of loops, as fusions (many instructions that run as one) and as branches. This
module relies on one rule of the text: a computation is printed after all computations that it calls.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Regular expressions, because jaxlib's own bindings (`jaxlib._hlo`) are private in jax 0.10.2, and their instructions
# have a name, an opcode and operands, but no shape, layout, trip count or replica groups.
_HEADER = re.compile(r"^(?P<entry>ENTRY\s+)?%?(?P<name>[\w.\-]+)\s*\(.*\{\s*$")
# The type ends before the first word that is followed by a bracket; no word precedes the brackets within a type.
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) ?\b(?P<opcode>[a-z][a-z0-9\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]\w*)\[(?P<shape>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?")
_BITS = re.compile(r"\d+")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLS = re.compile(
    r"\b(?P<how>calls|to_apply|condition|body|branch_computations|true_computation|false_computation)="
    r"(?:\{(?P<callees>[^}]*)\}|%?(?P<callee>[\w.\-]+))"
)
_CALLERS = {"while", "fusion", "call", "conditional", "async-start"}  # not reductions: `to_apply` adds two numbers
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_PARTITIONS = re.compile(r"\bnum_partitions=(\d+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_FUSED = re.compile(r"\bcalls=%?([\w.\-]+)")
_INTEGER = re.compile(r"\bconstant\((-?\d+)\)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of the type of a result, such as `bf16[16,197]{1,0:T(8,128)(2,1)S(1)}`."""

    dtype: str
    shape: tuple[int, ...]
    layout: str  # dimensions, the fastest-varying first; then, on a TPU, tiles T(...) and the memory space S(...)

    @property
    def bytes(self) -> int:
        """The bytes of its elements; 0 for a token."""
        return math.prod(self.shape) * _bits(self.dtype) // 8

    @property
    def stored_bytes(self) -> int:
        """The bytes that it occupies in memory: a TPU pads the last dimensions to full tiles."""
        tiles = _TILE.search(self.layout)
        if tiles is None:
            return self.bytes
        tile = _numbers(tiles[1])
        order = [self.shape[dimension] for dimension in reversed(_numbers(self.layout.partition(":")[0]))]
        order = [1] * (len(tile) - len(order)) + order  # the slowest-varying first, as in the tile
        outer, tiled = order[: len(order) - len(tile)], order[len(order) - len(tile) :]
        return math.prod(outer) * math.prod(-(-n // t) * t for n, t in zip(tiled, tile)) * _bits(self.dtype) // 8

    @property
    def in_main_memory(self) -> bool:
        """Whether it is in the device's main memory, not in on-chip memory (S(1) on a TPU) or in the host's."""
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
        """The arrays of the result; several if it is a tuple."""
        return tuple(
            Array(array["dtype"], tuple(_numbers(array["shape"])), array["layout"] or "")
            for array in _ARRAY.finditer(self.type)
        )

    @property
    def bytes(self) -> int:
        """The bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def target(self) -> str:
        """The target of a custom call; "" for any other instruction."""
        target = _TARGET.search(self.line) if self.opcode == "custom-call" else None
        return target[1] if target else ""

    @property
    def fused(self) -> str:
        """The name of the computation that a fusion runs."""
        computation = _FUSED.search(self.line)
        assert computation is not None
        return computation[1]

    def calls(self) -> Iterator[tuple[str, bool]]:
        """Yields (name of a called computation, whether it is the body or condition of a loop)."""
        if self.opcode in _CALLERS:
            for call in _CALLS.finditer(self.line):
                loop = call["how"] in ("body", "condition")
                for name in re.findall(r"[\w.\-]+", call["callee"] or call["callees"]):
                    yield name, loop


class Computation(dict[str, Instruction]):
    """The instructions of a computation by name, in the order of the text."""

    root: Instruction


@dataclasses.dataclass(frozen=True)
class Executions:
    """How often a computation runs during one execution of the program."""

    count: int  # a loop counts its trips, or 1 if their number is unknown; every branch counts as taken
    loops: int  # number of loops around it
    fused: bool  # whether it is inside a fusion, whose intermediate arrays stay on the chip


@dataclasses.dataclass(frozen=True)
class HloModule:
    """A parsed program."""

    computations: dict[str, Computation]
    entry: str  # name of the computation where the program starts
    partitions: int  # devices that run it together; on several TPU slices, those of one slice

    def executions(self) -> dict[str, Executions]:
        """Returns the executions of every computation that the entry reaches, the entry first."""
        executions = {self.entry: Executions(1, 0, False)}
        for name in reversed(self.computations):
            if name not in executions:
                continue
            caller = executions[name]
            for instruction in self.computations[name].values():
                for callee, loop in instruction.calls():
                    before = executions.get(callee, Executions(0, 0, False))
                    executions[callee] = Executions(
                        before.count + caller.count * (self._trips(instruction) if loop else 1),
                        max(before.loops, caller.loops + loop),
                        before.fused or caller.fused or instruction.opcode == "fusion",
                    )
        return executions

    def _trips(self, loop: Instruction) -> int:
        """Returns how often the body of a `while` runs: by the compiler's note, else by its condition, else 1."""
        if noted := _TRIPS.search(loop.line):
            return int(noted[1])
        conditions = (call for call in _CALLS.finditer(loop.line) if call["how"] == "condition")
        return self._bound(self.computations[next(conditions)["callee"]]) or 1

    def _bound(self, condition: Computation) -> int | None:
        """Returns n of a condition `i < n`. JAX's loops of known length count up from 0 by 1."""
        if condition.root.opcode == "fusion":  # the GPU compiler compares in a kernel of its own
            ((comparison, _),) = condition.root.calls()
            return self._bound(self.computations[comparison])
        if condition.root.opcode != "compare" or "direction=LT" not in condition.root.line:
            return None
        counter, bound = (condition[name] for name in condition.root.operands)
        constant = _INTEGER.search(bound.line)
        return int(constant[1]) if constant and counter.opcode in ("get-tuple-element", "parameter") else None


def parse(text: str) -> HloModule:
    """Returns the program that a compiled module's text describes."""
    computations: dict[str, Computation] = {}
    entry, current = "", Computation()
    for line in text.splitlines():
        if line.startswith(" "):
            if match := _INSTRUCTION.match(line):
                operands = tuple(_NAME.findall(line, match.end(), line.find(")", match.end())))
                instruction = Instruction(match["name"], match["opcode"], operands, line, match["type"])
                current[match["name"]] = instruction
                if match["root"]:
                    current.root = instruction
        elif (match := _HEADER.match(line)) and not line.startswith("HloModule"):
            current = computations[match["name"]] = Computation()
            entry = match["name"] if match["entry"] else entry
    partitions = _PARTITIONS.search(text.partition("\n")[0])
    return HloModule(computations, entry, int(partitions[1]) if partitions else 1)


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    bits = _BITS.search(dtype)  # f32, bf16, s8, f8e4m3fn; a token has none
    return int(bits[0]) if bits else 0


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
