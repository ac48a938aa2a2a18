"""Finds the collectives of a compiled program that no matrix product hides.

The text of a scheduled program lists instructions in the order in which they start. A collective is hidden if a product
is in its span: from the instruction that starts it to the one that waits for it. A synchronous collective, whose span
is one instruction, is exposed, unless the compiler fused it with a product. How long the products take is not compared.

The platforms write a span in four ways. GPU: a pair such as `all-gather-start` and `all-gather-done`, or `async-start`
and `async-done` around a computation that holds the collective. TPU: pieces of the collective in several fusions, the
first and the last alone, the others with a product each. Between TPU slices: a `send` to the host, and the `recv-done`
of the same rendezvous.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from vit_dist.plan import hlo
from vit_dist.plan.collectives import Collective, locate, piece_of
from vit_dist.plan.products import Products

_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')


class _Span(NamedTuple):
    computation: str
    first: str  # names of instructions
    last: str


def exposed(text: str, axes: Mapping[str, int]) -> list[Collective]:
    """Returns the collectives during which no product runs. For the arguments and errors see `collectives`."""
    program = hlo.parse(text)
    products, spans = Products(program), _Spans(program)
    return [
        located.collective
        for located in locate(program, axes)
        if not any(map(products.run, spans.within(spans.of(located.computation, located.instruction))))
    ]


class _Spans:
    """From where to where the collectives of a program run."""

    def __init__(self, program: hlo.HloModule):
        self._computations = program.computations
        executions = program.executions()
        self._scheduled = {name for name, execution in executions.items() if not execution.fused}
        self._callers: dict[str, tuple[str, hlo.Instruction]] = {}
        for name in executions:
            for instruction in program.computations[name].values():
                self._callers.update((callee, (name, instruction)) for callee, _ in instruction.calls())
        self._pieces = self._spans_of_pieces(executions)

    def of(self, name: str, collective: hlo.Instruction) -> _Span:
        """Returns the span of a collective, which is in the computation of this name."""
        if piece := piece_of(collective):
            return self._pieces[piece]
        name, instruction = self._outside_fusions(name, collective)
        computation = self._computations[name]
        if instruction.opcode.endswith("-done"):
            return _Span(name, instruction.operands[0], instruction.name)
        if instruction.opcode == "send":
            return _Span(name, instruction.name, _end_of_transfer(computation, instruction))
        caller = self._callers.get(name)
        if caller is not None and caller[1].opcode == "async-start":
            outside, start = caller
            return _Span(outside, start.name, _end_of_call(self._computations[outside], start))
        return _Span(name, instruction.name, instruction.name)

    def within(self, span: _Span) -> list[hlo.Instruction]:
        """Returns the instructions of a span, both ends included."""
        instructions = list(self._computations[span.computation].values())
        names = list(self._computations[span.computation])
        return instructions[names.index(span.first) : names.index(span.last) + 1]

    def _outside_fusions(self, name: str, instruction: hlo.Instruction) -> tuple[str, hlo.Instruction]:
        """Returns an instruction, or else the outermost fusion that it is in, with the name of the computation."""
        while name not in self._scheduled:
            name, instruction = self._callers[name]
        return name, instruction

    def _spans_of_pieces(self, names: Mapping[str, object]) -> dict[tuple[str, str], _Span]:
        spans: dict[tuple[str, str], _Span] = {}
        for name in names:
            for instruction in self._computations[name].values():
                if piece := piece_of(instruction):
                    outside, fusion = self._outside_fusions(name, instruction)
                    before = spans.get(piece, _Span(outside, fusion.name, fusion.name))
                    spans[piece] = self._joined(before, fusion.name)
        return spans

    def _joined(self, span: _Span, name: str) -> _Span:
        """Returns the shortest span that holds a span and an instruction of the same computation."""
        order = list(self._computations[span.computation])
        positions = sorted(map(order.index, (span.first, span.last, name)))
        return _Span(span.computation, order[positions[0]], order[positions[-1]])


def _end_of_transfer(computation: hlo.Computation, send: hlo.Instruction) -> str:
    """Returns the name of the `recv-done` that belongs to a `send`, or of the `send` if nothing is received."""

    def rendezvous(instruction: hlo.Instruction) -> list[str]:
        return _RENDEZVOUS.findall(instruction.line)

    for instruction in computation.values():
        if instruction.opcode == "recv-done" and rendezvous(computation[instruction.operands[0]]) == rendezvous(send):
            return instruction.name
    return send.name


def _end_of_call(computation: hlo.Computation, start: hlo.Instruction) -> str:
    """Returns the name of the `async-done` that waits for an `async-start`, maybe through an `async-update`."""
    waiting = {start.name}
    for instruction in computation.values():
        if waiting.intersection(instruction.operands) and instruction.opcode in ("async-update", "async-done"):
            waiting.add(instruction.name)
            if instruction.opcode == "async-done":
                return instruction.name
    return start.name
