"""What the device can do at the most: a large bf16 matrix product, and a copy within its memory.

Random data, since zeros run faster; several inputs in turn, larger than the cache; from idle to idle by the host's
clock, over so many calls that their dispatch does not show.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from visit.job import Job


def run(job: Job) -> None:
    """Keeps TFLOP/s and GB/s (bytes read and written), each the median, least and most of several rounds."""
    device, told = job.device(), job.arguments
    side, elements = told["side"], told["copy_mib"] * 2**20 // 4
    keys = jax.random.split(jax.random.key(0), 4)
    with jax.default_device(device):
        square = jax.jit(lambda key: jax.random.normal(key, (side, side), jnp.bfloat16))
        squares, product = [square(key) for key in keys], jax.jit(jnp.matmul)
        seconds = timed(lambda i: product(squares[i % 2], squares[2 + i % 2]), told["calls"], told["rounds"])
        job.keep(product_side=side, product_tflops=_rates([2 * side**3 / one / 1e12 for one in seconds]))
        flat = jax.jit(lambda key: jax.random.normal(key, (elements,), jnp.float32))
        arrays = [flat(key) for key in keys[:2]]
        copy = jax.jit(jnp.copy)
        seconds = timed(lambda i: copy(arrays[i % 2]), told["calls"], told["rounds"])
        job.keep(copy_bytes=4 * elements, copy_gbs=_rates([8 * elements / one / 1e9 for one in seconds]))


def timed(call: Callable[[int], Any], calls: int, rounds: int) -> list[float]:
    """The mean seconds of a call in each round, after one round to warm up."""
    means = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        for i in range(calls):
            last = call(i)
        jax.block_until_ready(last)
        means.append((time.perf_counter() - begun) / calls)
    return means[1:]


def _rates(rates: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(rates), "least": min(rates), "most": max(rates)}
