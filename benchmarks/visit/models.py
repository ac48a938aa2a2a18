"""The models that a visit times, as configs: bf16, AdamW, 1,000 classes, on one device; and states to begin with.

Blocks are unrolled unless asked otherwise: on a GPU a compiled loop over stacked blocks is planned to take half as long
again, or more, and nearly twice the memory.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from step import settings_for

from vit_dist import config
from vit_dist.program import Program
from vit_dist.step.state import State


def settings(variant: str, batch: int, image: int = 224, scan: bool = False) -> config.Config:
    """The config of a variant such as "B/16" at `image` pixels."""
    base = settings_for(variant, batch, "bfloat16")
    model = dataclasses.replace(base.model, image_size=image, scan=scan)
    return dataclasses.replace(base, mesh=config.Mesh(data=1), model=model)


def drawn_state(program: Program) -> State:
    """A state before the first step whose numbers NumPy draws. The mesh must be in use.

    Kernels and embeddings are from N(0, 0.02²), the norms' scales 1, all else 0. The program's own initialisation has
    to be compiled, which for unrolled blocks takes longer than to compile the step: of B/16 34 s beside 23 s, of L/16
    82 s beside 35 s (CUDA's compiler of jax 0.11.2 on two busy cores).
    """
    draw = np.random.default_rng(0)

    def fill(path: tuple[Any, ...], wanted: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("parameters/") and name.endswith("/scale"):
            return np.ones(wanted.shape, wanted.dtype)
        if name.startswith("parameters/") and wanted.ndim > 1:
            return draw.standard_normal(wanted.shape, np.float32) * np.float32(0.02)
        return np.zeros(wanted.shape, wanted.dtype)

    def put(array: np.ndarray, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        spec = PartitionSpec() if wanted.sharding is None else wanted.sharding.spec
        return jax.device_put(array, NamedSharding(program.mesh, spec))

    abstract = program.abstract_state()
    return jax.tree.map(put, jax.tree.map_with_path(fill, abstract), abstract)
