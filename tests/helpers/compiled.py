"""The training step of `tiny.py` compiled for a mesh, from shapes alone: nothing runs."""

import jax
import jax.numpy as jnp
from system import settings

from vit_dist.mesh.feed import batch_sharding
from vit_dist.plan.collectives import collectives
from vit_dist.program import Program


def program_on(sizes, *overrides, devices=None):
    """tiny.py on a mesh of these sizes of its axes, over these devices, which need not be here (None: those here)."""
    asked = {"data": 1, **sizes}
    axes = (f"mesh.{axis}={size}" for axis, size in asked.items())
    return Program(settings(*axes, *overrides), classes=10, steps=20, augment_on_device=True, devices=devices)


def compiled_step(program):
    """The compiled step of a program whose images are the digits', 8x8x1."""
    with program.in_use():
        rows, sharding = program.settings.batch_size, batch_sharding(program.mesh)
        shapes = {"image": ((rows, 8, 8, 1), jnp.uint8), "label": ((rows,), jnp.int32), "id": ((rows,), jnp.int32)}
        batch = {name: jax.ShapeDtypeStruct(*one, sharding=sharding) for name, one in shapes.items()}
        return program.train_step.lower(program.abstract_state(), batch).compile()


def step_collectives(program):
    """Every collective of the compiled step, by the axes of the program's mesh."""
    return collectives(compiled_step(program).as_text(), dict(program.mesh.shape))
