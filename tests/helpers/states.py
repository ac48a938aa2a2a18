"""States and batches of a test's own numbers, laid out as a program's are; to be called with its mesh in use."""

from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from reference import Flat, flattened

from vit_dist.mesh.feed import batch_sharding, put
from vit_dist.program import Program
from vit_dist.step.state import State


def random_parameters(program: Program, seed: int) -> Flat:
    """Normal numbers by path, around one for scales: no parameter can be left out unseen."""
    rng = np.random.default_rng(seed)
    return {
        path: (0.3 * rng.normal(size=leaf.shape) + path.endswith("scale")).astype(np.float32)
        for path, leaf in flattened(program.abstract_state().parameters).items()
    }


def state_of(program: Program, parameters: Any, average: Any = None) -> State:
    """The state before the first step, of these nested arrays."""
    abstract = program.abstract_state()
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), abstract.optimizer)
    return jax.tree.map(_put, State(np.zeros(()), parameters, zeros, average), abstract)


def batch_of(program: Program, **arrays: np.ndarray) -> dict[str, jax.Array]:
    """A global batch of these arrays."""
    return put(arrays, batch_sharding(program.mesh), len(arrays["label"]))


def _put(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    spec = PartitionSpec() if like.sharding is None else like.sharding.spec
    return jax.device_put(np.asarray(array, like.dtype), spec)
