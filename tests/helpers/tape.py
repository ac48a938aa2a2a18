"""Gradients of NumPy float64 programs, by reverse accumulation over the few operations that a transformer needs.

It shares nothing with jax, so that what jax computes can be judged by it. A `Value` remembers what it was computed
from, and how a gradient of it becomes gradients of those.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import erf

Pull = Callable[[np.ndarray], np.ndarray]
_numbers = itertools.count()


class Value:
    """A float64 array; arithmetic with arrays, numbers and other values gives values."""

    __array_ufunc__ = None  # so that NumPy leaves `array + value` to us

    def __init__(self, data: Any, parents: Sequence[tuple["Value", Pull]] = ()):
        self.data = np.asarray(data, np.float64)
        self.parents = parents
        self.number = next(_numbers)  # parents have smaller ones

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def __add__(self, other: Any) -> "Value":
        other = value(other)
        return Value(
            self.data + other.data,
            [(self, lambda g: _summed_to(self.shape, g)), (other, lambda g: _summed_to(other.shape, g))],
        )

    def __mul__(self, other: Any) -> "Value":
        other = value(other)
        return Value(
            self.data * other.data,
            [
                (self, lambda g: _summed_to(self.shape, g * other.data)),
                (other, lambda g: _summed_to(other.shape, g * self.data)),
            ],
        )

    def __matmul__(self, other: Any) -> "Value":
        other = value(other)
        return Value(
            self.data @ other.data,
            [
                (self, lambda g: _summed_to(self.shape, g @ other.data.swapaxes(-1, -2))),
                (other, lambda g: _summed_to(other.shape, self.data.swapaxes(-1, -2) @ g)),
            ],
        )

    def __pow__(self, exponent: float) -> "Value":
        return Value(self.data**exponent, [(self, lambda g: g * exponent * self.data ** (exponent - 1))])

    def __neg__(self) -> "Value":
        return self * -1.0

    def __sub__(self, other: Any) -> "Value":
        return self + -value(other)

    def __rsub__(self, other: Any) -> "Value":
        return -self + other

    def __truediv__(self, other: Any) -> "Value":
        return self * value(other) ** -1.0

    def __rtruediv__(self, other: Any) -> "Value":
        return self**-1.0 * other

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, index: Any) -> "Value":
        def pull(g: np.ndarray) -> np.ndarray:
            whole = np.zeros(self.shape)
            whole[index] = g
            return whole

        return Value(self.data[index], [(self, pull)])

    def sum(self, axis: int | None = None, keepdims: bool = False) -> "Value":
        def pull(g: np.ndarray) -> np.ndarray:
            return np.broadcast_to(g if axis is None or keepdims else np.expand_dims(g, axis), self.shape)

        return Value(self.data.sum(axis, keepdims=keepdims), [(self, pull)])

    def mean(self, axis: int, keepdims: bool = False) -> "Value":
        return self.sum(axis, keepdims) / self.shape[axis]

    def reshape(self, *shape: int) -> "Value":
        return Value(self.data.reshape(shape), [(self, lambda g: g.reshape(self.shape))])

    def transpose(self, *axes: int) -> "Value":
        return Value(self.data.transpose(axes), [(self, lambda g: g.transpose(np.argsort(axes)))])


def value(data: Any) -> Value:
    """The data as a value; a value as it is."""
    return data if isinstance(data, Value) else Value(data)


def _elementwise(function: Callable, slope: Callable) -> Callable[[Any], Value]:
    """slope: the derivative, of the input and the output."""

    def apply(x: Any) -> Value:
        x = value(x)
        y = function(x.data)
        return Value(y, [(x, lambda g: g * slope(x.data, y))])

    return apply


exp = _elementwise(np.exp, lambda x, y: y)
log = _elementwise(np.log, lambda x, y: 1 / x)
tanh = _elementwise(np.tanh, lambda x, y: 1 - y**2)
error_function = _elementwise(erf, lambda x, y: 2 / np.sqrt(np.pi) * np.exp(-(x**2)))


def concatenate(values: Sequence[Any], axis: int) -> Value:
    values = [value(one) for one in values]
    ends = np.cumsum([one.shape[axis] for one in values])

    def pull_of(number: int) -> Pull:
        return lambda g: np.split(g, ends[:-1], axis)[number]

    joined = np.concatenate([one.data for one in values], axis)
    return Value(joined, [(one, pull_of(number)) for number, one in enumerate(values)])


def gradients(of: Value, to: Sequence[Value]) -> list[np.ndarray]:
    """The gradients of a scalar with respect to these values."""
    totals: dict[int, np.ndarray] = {of.number: np.ones(())}
    waiting = {of.number: of}
    while waiting:
        last = waiting.pop(max(waiting))  # whatever was computed from it has been visited
        for parent, pull in last.parents:
            totals[parent.number] = totals.get(parent.number, 0.0) + pull(totals[last.number])
            waiting[parent.number] = parent
    return [totals.get(one.number, np.zeros(one.shape)) for one in to]


def _summed_to(shape: tuple[int, ...], gradient: np.ndarray) -> np.ndarray:
    """The gradient of an array that was broadcast from this shape, as a gradient of what it was broadcast from."""
    extra = gradient.ndim - len(shape)
    repeated = [axis + extra for axis, size in enumerate(shape) if size == 1 and gradient.shape[axis + extra] > 1]
    return gradient.sum((*range(extra), *repeated)).reshape(shape)
