"""Arrays that are made of stored tensors, and of which a slice is computed when it is asked for.

A parameter of ours is often a stored tensor transposed, cut into heads, or stacked with those of other blocks. Each of
these steps maps a slice of its result to slices of what it is made of. So every process reads those parts of a file
that its own shards need, and no tensor is ever held whole because another layout is wanted.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from vit_dist.weights.stored_tensor import StoredTensor

Index = tuple[slice, ...]  # one for each axis, without steps


class Lazy:
    """An array of float32 of this shape; `compute` returns the slice at an index."""

    def __init__(self, shape: Sequence[int], compute: Callable[[Index], np.ndarray]):
        self.shape = tuple(shape)
        self._compute = compute

    def read(self, index: Index = ()) -> np.ndarray:
        """Returns the slice at `index`, float32 in C order; axes that it does not name are read whole."""
        index = (*index, *(slice(None) for _ in self.shape[len(index) :]))
        index = tuple(slice(*one.indices(size)[:2]) for one, size in zip(index, self.shape, strict=True))
        return np.ascontiguousarray(self._compute(index), np.float32)

    def transposed(self, *axes: int) -> "Lazy":
        """Returns the array with its axes in this order."""
        inverse = [axes.index(axis) for axis in range(len(axes))]
        shape = [self.shape[axis] for axis in axes]
        return Lazy(shape, lambda index: self.read(tuple(index[axis] for axis in inverse)).transpose(axes))

    def split(self, axis: int, *sizes: int) -> "Lazy":
        """Returns the array with an axis split into two of these sizes; only what the slices of both need is read."""
        outer, inner = sizes
        assert outer * inner == self.shape[axis]

        def compute(index: Index) -> np.ndarray:
            before, (first, second), after = index[:axis], index[axis : axis + 2], index[axis + 2 :]
            if second == slice(0, inner):
                spans = [slice(first.start * inner, first.stop * inner)]
            else:
                spans = [
                    slice(i * inner + second.start, i * inner + second.stop) for i in range(first.start, first.stop)
                ]
            parts = [self.read((*before, span, *after)) for span in spans]
            sides = first.stop - first.start, second.stop - second.start
            joined = np.concatenate(parts, axis) if parts else self.read((*before, slice(0, 0), *after))
            return joined.reshape(*joined.shape[:axis], *sides, *joined.shape[axis + 1 :])

        return Lazy((*self.shape[:axis], outer, inner, *self.shape[axis + 1 :]), compute)

    def shaped(self, *shape: int) -> "Lazy":
        """Returns the array in another shape; to read a slice, all of it is read, which is for small arrays."""
        assert math.prod(shape) == math.prod(self.shape)
        return Lazy(shape, lambda index: self.read().reshape(shape)[index])

    def at(self, number: int) -> "Lazy":
        """Returns entry `number` along the first axis."""
        return Lazy(self.shape[1:], lambda index: self.read((slice(number, number + 1), *index))[0])

    def part(self, axis: int, start: int, stop: int) -> "Lazy":
        """Returns the slice from `start` to before `stop` along an axis."""
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])

        def compute(index: Index) -> np.ndarray:
            span = slice(start + index[axis].start, start + index[axis].stop)
            return self.read((*index[:axis], span, *index[axis + 1 :]))

        return Lazy(shape, compute)


def stored(tensor: StoredTensor) -> Lazy:
    """Returns a tensor of a file."""
    return Lazy(tensor.shape, lambda index: tensor.read(index).astype(np.float32))


def zeros(*shape: int) -> Lazy:
    """Returns an array of zeros."""
    return Lazy(shape, lambda index: np.zeros(_sizes(index), np.float32))


def stacked(parts: Sequence[Lazy], axis: int) -> Lazy:
    """Returns arrays of one shape as one, with a new axis that counts them."""
    shape = parts[0].shape
    assert all(part.shape == shape for part in parts)

    def compute(index: Index) -> np.ndarray:
        rest = (*index[:axis], *index[axis + 1 :])
        chosen = parts[index[axis]]
        return np.stack([part.read(rest) for part in chosen], axis) if chosen else np.empty(_sizes(index), np.float32)

    return Lazy((*shape[:axis], len(parts), *shape[axis:]), compute)


def _sizes(index: Index) -> list[int]:
    return [one.stop - one.start for one in index]


def computed(shape: Sequence[int], function: Callable[..., np.ndarray], *sources: Lazy) -> Lazy:
    """Returns `function` of whole arrays, for small ones: it is called anew for every slice that is read."""
    return Lazy(shape, lambda index: function(*(source.read() for source in sources))[index])
