"""Gradients reduced together and norms of split arrays: the same numbers as array by array, on every mesh."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from vit_dist.mesh import layout
from vit_dist.step import arrays

RNG = np.random.default_rng(0)
LARGE = (1, 300, 4, 256)  # more elements than `arrays.SMALL`
NAMES: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {
    "split once": ((8, 6), ("width", None)),
    "split twice": ((4, 8), ("mlp", "width")),
    "large": (LARGE, (None, None, None, None)),
    "large and split": (LARGE, (None, None, "heads", "width")),
    "vector": ((5,), (None,)),
    "matrix": ((3, 2), (None, None)),
    "number": ((), ()),
}
ARRAYS: Any = {name: RNG.normal(size=shape).astype(np.float32) for name, (shape, _) in NAMES.items()}


def mesh_of(**sizes: int) -> Any:
    count = int(np.prod(list(sizes.values())))
    explicit = (AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=explicit, devices=jax.devices()[:count])


def stored() -> dict[str, jax.Array]:
    return {name: layout.reshard(jnp.asarray(ARRAYS[name]), *names) for name, (_, names) in NAMES.items()}


@pytest.mark.parametrize("sizes", [{}, {"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_the_norm_is_that_of_all_numbers_on_every_mesh(sizes: dict[str, int]) -> None:
    with jax.set_mesh(mesh_of(**sizes)) if sizes else contextlib.nullcontext():
        found = jax.jit(arrays.norm)(stored())
        some = jax.jit(lambda tree: arrays.norm({"vector": tree["vector"], "none": None}))(stored())
        assert arrays.norm({"none": None}) == 0
    every = np.concatenate([array.reshape(-1) for array in ARRAYS.values()]).astype(np.float64)
    assert float(found) == pytest.approx(np.linalg.norm(every), rel=1e-6)
    assert float(some) == pytest.approx(np.linalg.norm(ARRAYS["vector"]), rel=1e-6)


@pytest.mark.parametrize("gather", ["microbatch", "step"])
def test_gradients_are_reduced_as_one_by_one_and_the_small_ones_as_one_array(gather: str) -> None:
    def gradients_by(reduce: Any) -> Any:
        def gradients(parameters: Any, x: jax.Array) -> Any:
            def loss(deferred: Any) -> jax.Array:
                gathered = [layout.gathered(p, layout.spec_of(x)) for p in jax.tree.leaves(deferred)]
                sums = sum(jnp.sum(jnp.sin(p)) * (i + 1) for i, p in enumerate(gathered))
                return jnp.sum(x * layout.broadcast(sums, x.shape, layout.spec_of(x)))

            deferred = jax.tree.map(lambda p: layout.defer_reduction(p, gather), parameters)
            return reduce(jax.grad(loss)(deferred), parameters)

        return jax.jit(gradients)

    with jax.set_mesh(mesh_of(data=2, fsdp=2, tensor=2)):
        parameters = {"vector 2": stored()["vector"], **stored()}
        x = layout.reshard(jnp.arange(8.0), "batch")
        one_by_one = gradients_by(lambda *trees: jax.tree.map(layout.as_stored, *trees))(parameters, x)
        together = gradients_by(arrays.reduce_gradients)(parameters, x)
        for path, gradient in together.items():
            assert gradient.sharding.spec == parameters[path].sharding.spec == one_by_one[path].sharding.spec
            np.testing.assert_array_equal(gradient, one_by_one[path], err_msg=path)
        text = gradients_by(arrays.reduce_gradients).lower(parameters, x).compile().as_text()
    summed = [line for line in text.splitlines() if " all-reduce(" in line]
    small = 5 + 5 + 6 + 1
    assert any(f"f32[{small}]" in line for line in summed)
    assert not any("f32[5]" in line for line in summed)


@pytest.mark.parametrize(
    ("shape", "sums"),
    [((768, 3, 12, 64), 768), ((12, 64, 768), 12 * 64), ((12, 768, 3072), 12 * 768), ((100_000,), 100_000)],
)
def test_an_array_is_summed_in_sums_enough_to_occupy_a_gpu(shape: tuple[int, ...], sums: int) -> None:
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert jax.eval_shape(arrays._sums_of_squares, array).shape == (sums,)
