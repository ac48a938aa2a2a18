"""Counts the kernels of a step, and the bytes that they read and write in a device's memory, from the compiled program.

An instruction reads its operands and writes its result once. A fusion is one instruction whose intermediate arrays stay
on the chip; so do arrays that a TPU's compiler placed in on-chip memory. The effects of caches and of access patterns
are ignored. Collectives count as 0 bytes: links bound their time. A kernel is an instruction that computes or copies:
neither a fused one, nor a collective, nor one that only names, orders or calls others.
"""

import dataclasses
import functools
import re

from vit_dist.plan import hlo
from vit_dist.plan.collectives import KINDS
from vit_dist.plan.products import PRODUCT_TARGETS, Products

_MOVES_NOTHING = {  # opcodes that only name, order or call
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "opt-barrier"),
    *("after-all", "add-dependency", "partition-id", "replica-id", "async-update", "async-done", "send", "recv"),
    *("send-done", "recv-done", *KINDS, *(f"{kind}-done" for kind in KINDS)),
}
_MOVES_NOTHING_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"}
_SLICES = {"slice", "dynamic-slice", "gather"}  # they read only as much of their first operand as they return
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # they write in place; index of the operand that is written
_VIEWS = {"bitcast", "reshape"}
_INDEX = re.compile(r"\bindex=(\d+)")
_PARAMETER = re.compile(r"\bparameter\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes read and written in a device's memory, and the kernels that do so."""

    product_bytes: int  # by matrix products and everything fused with them
    other_bytes: int  # by all other instructions
    kernels: int  # instructions that run, of both kinds; one in a loop counts at every trip


def traffic(text: str) -> Traffic:
    """Returns the traffic of one device in one execution of a compiled program (`compiled.as_text()`)."""
    program = hlo.parse(text)
    fusions, products = _Fusions(program), Products(program)
    moved, kernels = {True: 0, False: 0}, 0
    for name, executions in program.executions().items():
        if not executions.fused:
            computation = program.computations[name]
            for instruction in computation.values():
                if not _moves_nothing(instruction):
                    size = _moved_bytes(instruction, computation, fusions)
                    moved[products.run(instruction)] += executions.count * size
                    kernels += executions.count
    return Traffic(product_bytes=moved[True], other_bytes=moved[False], kernels=kernels)


class _Fusions:
    """Bytes that fused computations read of each operand and write of each result, by the computation's name."""

    def __init__(self, program: hlo.HloModule):
        self._computations = program.computations
        self.reads = functools.cache(self._reads)
        self.writes = functools.cache(self._writes)

    def _reads(self, name: str) -> list[int]:
        """Returns the bytes that a computation reads of each parameter."""
        computation = self._computations[name]
        users: dict[str, list[tuple[hlo.Instruction, int]]] = {}
        for instruction in computation.values():
            for position, operand in enumerate(instruction.operands):
                users.setdefault(operand, []).append((instruction, position))

        def read_bytes(value: hlo.Instruction) -> int:
            total = sum(read_by(user, position, value) for user, position in users.get(value.name, ()))
            return min(_size(value), total)

        def read_by(user: hlo.Instruction, position: int, value: hlo.Instruction) -> int:
            if user.opcode in _VIEWS:
                return read_bytes(user)
            if user.opcode in _SLICES and position == 0:
                return _size(user)
            if user.opcode == "fusion":
                return self.reads(user.fused)[position]
            in_place = user.opcode in _UPDATES and position == 0
            return 0 if in_place or _moves_nothing(user) else _size(value)

        by_parameter = {}
        for instruction in computation.values():
            if number := _PARAMETER.search(instruction.line):
                by_parameter[int(number[1])] = read_bytes(instruction)
        return [by_parameter[number] for number in sorted(by_parameter)]

    def _writes(self, name: str) -> list[int]:
        """Returns the bytes that a computation writes of each array of its result."""
        computation = self._computations[name]
        root = computation.root
        results = [computation[operand] for operand in root.operands] if root.opcode == "tuple" else [root]
        return [size for result in results for size in self._written(result, computation)]

    def _written(self, value: hlo.Instruction, computation: hlo.Computation) -> list[int]:
        sizes = [array.stored_bytes for array in value.arrays]
        value = _without_views(value, computation)
        source = _without_views(computation[value.operands[0]], computation) if value.operands else value
        if value.opcode == "fusion":
            return self.writes(value.fused)
        if value.opcode == "get-tuple-element" and source.opcode == "fusion":
            index = _INDEX.search(value.line)
            assert index is not None
            return [self.writes(source.fused)[int(index[1])]]
        if value.opcode in _UPDATES and source.opcode == "parameter":
            return [_size(computation[value.operands[_UPDATES[value.opcode]]])]
        communicated = value.opcode in KINDS or (value.opcode in _SLICES and source.opcode in KINDS)
        passed_on = value.opcode == "parameter" or value.target in _MOVES_NOTHING_TARGETS
        return [0 for _ in sizes] if communicated or passed_on else sizes


def _moved_bytes(instruction: hlo.Instruction, computation: hlo.Computation, fusions: _Fusions) -> int:
    """Returns the bytes that an instruction outside fusions reads and writes in the device's memory."""
    operands = [computation[name] for name in instruction.operands]
    if instruction.opcode == "fusion":
        body = instruction.fused
        read = sum(min(_in_memory(operand), size) for operand, size in zip(operands, fusions.reads(body), strict=True))
        written = zip(instruction.arrays, fusions.writes(body), strict=True)
        return read + sum(size for array, size in written if array.in_main_memory)
    if instruction.opcode.endswith("-done"):  # of a copy or slice, whose first half has the operand
        read = min(_in_memory(computation[operands[0].operands[0]]), _size(instruction))
    elif instruction.opcode in _SLICES:
        read = min(_in_memory(operands[0]), _size(instruction))
    elif instruction.opcode in _UPDATES:
        update = operands[_UPDATES[instruction.opcode]]
        return _in_memory(update) + min(_in_memory(instruction), _size(update))
    else:
        read = sum(_in_memory(operand) for operand in dict.fromkeys(operands))
    return read + _in_memory(instruction) - _workspace_bytes(instruction)


def _workspace_bytes(instruction: hlo.Instruction) -> int:
    """Returns the size of a library call's workspace, which is a part of its result and may stay unused."""
    if not instruction.target.startswith(PRODUCT_TARGETS):
        return 0
    return sum(array.bytes for array in instruction.arrays if array.dtype in ("s8", "u8"))


def _moves_nothing(instruction: hlo.Instruction) -> bool:
    opcode = instruction.opcode
    return opcode in _MOVES_NOTHING or opcode.endswith("-start") or instruction.target in _MOVES_NOTHING_TARGETS


def _without_views(value: hlo.Instruction, computation: hlo.Computation) -> hlo.Instruction:
    while value.opcode in _VIEWS:
        value = computation[value.operands[0]]
    return value


def _size(value: hlo.Instruction) -> int:
    return sum(array.stored_bytes for array in value.arrays)


def _in_memory(value: hlo.Instruction) -> int:
    """Returns the bytes of a value in the device's main memory; 0 for what is on the chip."""
    return sum(array.stored_bytes for array in value.arrays if array.in_main_memory)
