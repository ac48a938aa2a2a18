"""The products of matrices in a traced function: how many there are, and how many operations they cost.

A product of a matrix and a vector is a weighted sum and does not count.
What a compiler reports cannot be compared (a loop's body counts once, a fused product not at all); a jaxpr is exact.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax


def products(function: Any, *arguments: Any) -> tuple[int, int]:
    """(how many `dot_general`s one call runs, their floating-point operations), a multiply and an add counted apart."""
    costs = list(_costs(jax.make_jaxpr(function)(*arguments).jaxpr))
    return sum(times for times, _ in costs), sum(times * flops for times, flops in costs)


def equations(jaxpr: Any) -> Iterator[tuple[Any, int]]:
    """Every equation, those of inner jaxprs too, with how many times it runs."""
    for equation in jaxpr.eqns:
        yield equation, 1
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)  # a closed jaxpr's own
                if hasattr(inner, "eqns"):
                    yield from ((each, times * count) for each, count in equations(inner))


def _costs(jaxpr: Any) -> Iterator[tuple[int, int]]:
    for equation, times in equations(jaxpr):
        if equation.primitive.name == "dot_general" and min(one.aval.ndim for one in equation.invars) > 1:
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            yield times, 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
