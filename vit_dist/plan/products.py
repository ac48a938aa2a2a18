"""Tells which instructions of a compiled program compute matrix products.

A product is an instruction of its own, a call of a library (cuBLAS, cuDNN's attention), or a part of a fusion.
"""

import functools

from vit_dist.plan import hlo

PRODUCT_TARGETS = ("__cublas", "__cudnn", "__onednn$matmul")  # prefixes of custom calls' targets
_OPCODES = {"dot", "convolution"}


class Products:
    """The instructions of one program that compute products."""

    def __init__(self, program: hlo.HloModule):
        self._computations = program.computations
        self._contains = functools.cache(self._any)

    def run(self, instruction: hlo.Instruction) -> bool:
        """Whether a product runs when this instruction does: in it, or in a fusion, loop or branch that it calls."""
        if instruction.opcode in _OPCODES or instruction.target.startswith(PRODUCT_TARGETS):
            return True
        return any(self._contains(name) for name, _ in instruction.calls())

    def _any(self, name: str) -> bool:
        return any(map(self.run, self._computations[name].values()))
