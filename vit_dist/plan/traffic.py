"""Bytes that a device moves to and from its memory in a step, by the compiled program.

An instruction reads its operands and writes its result once; a fusion is one instruction, and what passes within it
stays on the chip. So do arrays that a TPU's compiler has put there. What caches save and what a bad access pattern
wastes is not seen. Collectives count nothing here: wires bound them.
"""

import dataclasses
import functools
import re

from vit_dist.plan import hlo
from vit_dist.plan.collectives import KINDS

_STILL = {  # they name, order or call
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "opt-barrier"),
    *("after-all", "add-dependency", "partition-id", "replica-id", "async-update", "async-done", "send", "recv"),
    *("send-done", "recv-done", *KINDS, *(f"{kind}-done" for kind in KINDS)),
}
_STILL_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"}
_SLICES = {"slice", "dynamic-slice", "gather"}  # they read no more of their first operand than they return
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # written in place; which operand holds what is written
_VIEWS = {"bitcast", "reshape"}
_PRODUCTS = {"dot", "convolution"}
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_PRODUCT_TARGETS = ("__cublas", "__cudnn", "__onednn$matmul")
_FUSED = re.compile(r"\bcalls=%?([\w.\-]+)")
_INDEX = re.compile(r"\bindex=(\d+)")
_NUMBER = re.compile(r"\bparameter\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    product_bytes: int  # moved by matrix products and by what is fused with them
    other_bytes: int  # moved by everything else


def traffic(text: str) -> Traffic:
    """What one device reads and writes in its memory in one run of a compiled program (`compiled.as_text()`)."""
    program = hlo.read(text)
    fusions = _Fusions(program)
    moved = {True: 0, False: 0}
    for name, runs in program.runs().items():
        if not runs.fused:
            computation = program.computations[name]
            for instruction in computation.values():
                moved[fusions.is_product(instruction)] += runs.times * _moved(instruction, computation, fusions)
    return Traffic(product_bytes=moved[True], other_bytes=moved[False])


class _Fusions:
    """What fused computations read of each operand and write of each result, by name; each is looked at once."""

    def __init__(self, program: hlo.HloModule):
        self._computations = program.computations
        self.reads = functools.cache(self._reads)
        self.writes = functools.cache(self._writes)
        self._has_product = functools.cache(self._look_for_product)

    def is_product(self, instruction: hlo.Instruction) -> bool:
        if instruction.opcode == "fusion":
            return self._has_product(_body(instruction))
        return instruction.opcode in _PRODUCTS or _target(instruction).startswith(_PRODUCT_TARGETS)

    def _look_for_product(self, name: str) -> bool:
        return any(self.is_product(instruction) for instruction in self._computations[name].values())

    def _reads(self, name: str) -> list[int]:
        """Bytes by parameter."""
        computation = self._computations[name]
        users: dict[str, list[tuple[hlo.Instruction, int]]] = {}
        for instruction in computation.values():
            for position, operand in enumerate(instruction.operands):
                users.setdefault(operand, []).append((instruction, position))

        def used(value: hlo.Instruction) -> int:
            return min(_size(value), sum(by(user, position, value) for user, position in users.get(value.name, ())))

        def by(user: hlo.Instruction, position: int, value: hlo.Instruction) -> int:
            if user.opcode in _VIEWS:
                return used(user)
            if user.opcode in _SLICES and position == 0:
                return _size(user)
            if user.opcode == "fusion":
                return self.reads(_body(user))[position]
            in_place = user.opcode in _UPDATES and position == 0
            return 0 if in_place or _is_still(user) else _size(value)

        read = {}
        for instruction in computation.values():
            if number := _NUMBER.search(instruction.line):
                read[int(number[1])] = used(instruction)
        return [read[number] for number in sorted(read)]

    def _writes(self, name: str) -> list[int]:
        """Bytes by array of the result."""
        computation = self._computations[name]
        root = computation.root
        results = [computation[operand] for operand in root.operands] if root.opcode == "tuple" else [root]
        return [size for result in results for size in self._written(result, computation)]

    def _written(self, value: hlo.Instruction, computation: hlo.Computation) -> list[int]:
        whole = [array.stored_bytes for array in value.arrays]
        value = _seen_through(value, computation)
        source = _seen_through(computation[value.operands[0]], computation) if value.operands else value
        if value.opcode == "fusion":
            return self.writes(_body(value))
        if value.opcode == "get-tuple-element" and source.opcode == "fusion":
            index = _INDEX.search(value.line)
            assert index is not None
            return [self.writes(_body(source))[int(index[1])]]
        if value.opcode in _UPDATES and source.opcode == "parameter":
            return [_size(computation[value.operands[_UPDATES[value.opcode]]])]
        travelled = value.opcode in KINDS or (value.opcode in _SLICES and source.opcode in KINDS)
        handed_on = value.opcode == "parameter" or _target(value) in _STILL_TARGETS
        return [0 for _ in whole] if travelled or handed_on else whole


def _moved(instruction: hlo.Instruction, computation: hlo.Computation, fusions: _Fusions) -> int:
    """Bytes that an instruction that is not within a fusion reads and writes in the device's memory."""
    if _is_still(instruction):
        return 0
    operands = [computation[name] for name in instruction.operands]
    if instruction.opcode == "fusion":
        body = _body(instruction)
        read = sum(min(_in_memory(operand), size) for operand, size in zip(operands, fusions.reads(body), strict=True))
        written = zip(instruction.arrays, fusions.writes(body), strict=True)
        return read + sum(size for array, size in written if array.in_main_memory)
    if instruction.opcode.endswith("-done"):  # of a copy or slice: the first half names what is read
        read = min(_in_memory(computation[operands[0].operands[0]]), _size(instruction))
    elif instruction.opcode in _SLICES:
        read = min(_in_memory(operands[0]), _size(instruction))
    elif instruction.opcode in _UPDATES:
        update = operands[_UPDATES[instruction.opcode]]
        return _in_memory(update) + min(_in_memory(instruction), _size(update))
    else:
        read = sum(_in_memory(operand) for operand in dict.fromkeys(operands))
    return read + _in_memory(instruction) - _scratch(instruction)


def _scratch(instruction: hlo.Instruction) -> int:
    """Bytes of a library's result that are room for it to work in, which it asks for as plain bytes and may not use."""
    if not _target(instruction).startswith(_PRODUCT_TARGETS):
        return 0
    return sum(array.bytes for array in instruction.arrays if array.dtype in ("s8", "u8"))


def _is_still(instruction: hlo.Instruction) -> bool:
    opcode = instruction.opcode
    return opcode in _STILL or opcode.endswith("-start") or _target(instruction) in _STILL_TARGETS


def _target(instruction: hlo.Instruction) -> str:
    """What a custom call calls; empty for anything else."""
    found = _TARGET.search(instruction.line) if instruction.opcode == "custom-call" else None
    return found[1] if found else ""


def _body(fusion: hlo.Instruction) -> str:
    found = _FUSED.search(fusion.line)
    assert found is not None
    return found[1]


def _seen_through(value: hlo.Instruction, computation: hlo.Computation) -> hlo.Instruction:
    while value.opcode in _VIEWS:
        value = computation[value.operands[0]]
    return value


def _size(value: hlo.Instruction) -> int:
    return sum(array.stored_bytes for array in value.arrays)


def _in_memory(value: hlo.Instruction) -> int:
    """Its size, but 0 where it lies on the chip."""
    return sum(array.stored_bytes for array in value.arrays if array.in_main_memory)
