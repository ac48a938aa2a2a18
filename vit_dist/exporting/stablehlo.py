"""A model as one StableHLO program for CPUs, GPUs and TPUs, which a process with jax alone runs on any batch.

The parameters lie beside the program and are its first argument, a dict by path: a program that holds them is limited
to 2 GB, is compiled anew for every change of a number, and its compiler tries to compute with them.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from vit_dist.exporting.function import Input, function_of, images_of
from vit_dist.weights.description import Subject

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, PARAMETERS = "model.stablehlo", "parameters.npz"


def write(subject: Subject, input: Input, folder: Path) -> None:
    """Writes the program, as `jax.export.deserialize` reads it, and the parameters into a folder."""
    run = function_of(subject.model, subject.data, input)
    shapes = {path: jax.ShapeDtypeStruct(array.shape, jnp.float32) for path, array in subject.parameters.items()}
    (batch,) = jax_export.symbolic_shape("batch")
    images = images_of(subject.model, input, batch)
    exported = jax_export.export(jax.jit(run), platforms=PLATFORMS)(shapes, images)
    (folder / PROGRAM).write_bytes(exported.serialize())
    np.savez(folder / PARAMETERS, **subject.parameters)  # type: ignore[arg-type]
