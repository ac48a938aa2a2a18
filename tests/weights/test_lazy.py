"""A slice of an array that is made of stored tensors is what NumPy makes of whole arrays, and reads no more than it."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vit_dist.weights.lazy import Lazy, computed, stacked, stored, zeros
from vit_dist.weights.stored_tensor import StoredTensor


@dataclasses.dataclass(frozen=True)
class Counting(StoredTensor):
    """A stored tensor that counts the numbers it is asked for."""

    asked: list[int] = dataclasses.field(default_factory=list)

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        values = super().read(index)
        self.asked.append(values.size)
        return values


def tensor(values: np.ndarray) -> Counting:
    return Counting("w", values.shape, values.dtype, Path("w.npz"), lambda: values)


def numbers(*shape: int) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


def random_index(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Slices of some leading axes: a part, all, or nothing of each."""

    def one(size: int) -> slice:
        start, stop = sorted(rng.integers(0, size + 1, 2).tolist())
        return [slice(start, stop), slice(None), slice(start, None), slice(start, start)][
            rng.choice(4, p=[0.6, 0.2, 0.15, 0.05])
        ]

    return tuple(one(size) for size in shape[: rng.integers(0, len(shape) + 1)])


def assert_equal_everywhere(lazy: Lazy, expected: np.ndarray, rng: np.random.Generator, times: int = 20) -> None:
    assert lazy.shape == expected.shape
    for index in [(), *(random_index(rng, lazy.shape) for _ in range(times))]:
        found = lazy.read(index)
        assert found.dtype == np.float32 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected[index], err_msg=str(index))


OPERATIONS: dict[str, tuple[Callable[[Lazy], Lazy], Callable[[np.ndarray], np.ndarray]]] = {
    "stored": (lambda a: a, lambda a: a),
    "transposed": (lambda a: a.transposed(2, 0, 1), lambda a: a.transpose(2, 0, 1)),
    "first axis split": (lambda a: a.split(0, 2, 3), lambda a: a.reshape(2, 3, 4, 10)),
    "last axis split": (lambda a: a.split(2, 5, 2), lambda a: a.reshape(6, 4, 5, 2)),
    "split into one": (lambda a: a.split(1, 1, 4), lambda a: a.reshape(6, 1, 4, 10)),
    "part": (lambda a: a.part(1, 1, 3), lambda a: a[:, 1:3]),
    "at": (lambda a: a.at(2), lambda a: a[2]),
    "shaped": (lambda a: a.shaped(8, 30), lambda a: a.reshape(8, 30)),
    "stacked first": (lambda a: stacked([a, a.part(0, 0, 6), zeros(6, 4, 10)], 0), lambda a: np.stack([a, a, 0 * a])),
    "stacked within": (lambda a: stacked([a, zeros(6, 4, 10)], 2), lambda a: np.stack([a, 0 * a], 2)),
    "computed": (lambda a: computed((6, 4, 20), lambda x: np.tile(x, 2), a), lambda a: np.tile(a, 2)),
    "zeros": (lambda a: zeros(3, 2), lambda a: np.zeros((3, 2))),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8"])
def test_any_slice_is_that_of_the_whole(name: str, dtype: str) -> None:
    of_lazy, of_array = OPERATIONS[name]
    values = (numbers(6, 4, 10) % 100).astype(dtype)
    assert_equal_everywhere(of_lazy(stored(tensor(values))), of_array(values), np.random.default_rng(0), 40)


@pytest.mark.parametrize("seed", range(60))
def test_any_slice_of_a_random_chain_is_that_of_the_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    array = numbers(*rng.choice([1, 2, 3, 4, 6, 12], rng.integers(1, 4)).tolist())
    lazy = stored(tensor(array))
    for _ in range(rng.integers(1, 7)):
        axis = int(rng.integers(0, max(1, array.ndim)))
        size = array.shape[axis] if array.ndim else 0
        match rng.integers(0, 6):
            case 0:
                axes = rng.permutation(array.ndim).tolist()
                lazy, array = lazy.transposed(*axes), array.transpose(axes)
            case 1 if array.ndim and size:
                outer = int(rng.choice([n for n in range(1, size + 1) if size % n == 0]))
                lazy = lazy.split(axis, outer, size // outer)
                array = array.reshape(*array.shape[:axis], outer, size // outer, *array.shape[axis + 1 :])
            case 2 if array.ndim:
                start, stop = sorted(rng.integers(0, size + 1, 2).tolist())
                lazy, array = lazy.part(axis, start, stop), array[(slice(None),) * axis + (slice(start, stop),)]
            case 3 if array.ndim > 1 and len(array):
                number = int(rng.integers(0, len(array)))
                lazy, array = lazy.at(number), array[number]
            case 4:
                shape = (array.size,) if rng.random() < 0.5 else (1, *array.shape)
                lazy, array = lazy.shaped(*shape), array.reshape(shape)
            case 5 if array.ndim < 5:
                axis = int(rng.integers(0, array.ndim + 1))
                lazy, array = stacked([lazy, zeros(*lazy.shape), lazy], axis), np.stack([array, 0 * array, array], axis)
    assert_equal_everywhere(lazy, array, rng)


def test_a_share_of_the_heads_reads_their_rows_alone() -> None:
    heads, size, width = 4, 16, 64
    own = tensor(numbers(3 * width, width))
    part = (stored(own).part(0, i * width, (i + 1) * width).transposed(1, 0).split(1, heads, size) for i in range(3))
    qkv = stacked(list(part), 1)
    expected = own.load().reshape(3, heads, size, width).transpose(3, 0, 1, 2)
    assert_equal_everywhere(qkv, expected, np.random.default_rng(0))
    cases: list[tuple[tuple[slice, ...], int]] = [
        ((slice(None), slice(None), slice(1, 2)), 3 * size * width),  # one head of four
        ((slice(0, 16),), 3 * 16 * width),  # a quarter of the inputs
        ((slice(0, 16), slice(1, 2), slice(2, 4)), 16 * 2 * size),  # of the keys, of two heads
        ((slice(0, 0),), 0),
        ((slice(None), slice(0, 0)), 0),
    ]
    for index, asked in cases:
        own.asked.clear()
        np.testing.assert_array_equal(qkv.read(index), expected[index])
        assert sum(own.asked) == asked, index


def test_a_share_of_each_head_reads_that_of_each_head() -> None:
    own = tensor(numbers(8, 12))
    split = stored(own).split(1, 3, 4)
    np.testing.assert_array_equal(
        split.read((slice(2, 4), slice(1, 3), slice(1, 3))), own.load().reshape(8, 3, 4)[2:4, 1:3, 1:3]
    )
    assert sum(own.asked) == 2 * 2 * 2


def test_one_block_of_stacked_blocks_reads_that_block_alone() -> None:
    blocks = [tensor(numbers(4, 6)) for _ in range(3)]
    stack = stacked([stored(block) for block in blocks], 0)
    stack.read((slice(1, 2), slice(0, 2)))
    assert [sum(block.asked) for block in blocks] == [0, 12, 0]
    whole = tensor(numbers(3, 4, 6))
    stored(whole).at(2).read((slice(0, 1),))
    assert sum(whole.asked) == 6


def test_low_precision_becomes_float32_without_rounding() -> None:
    import ml_dtypes

    values = np.float32([1.0, -2.5, 3.140625]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(stored(tensor(values)).read(), np.float32([1.0, -2.5, 3.140625]))
