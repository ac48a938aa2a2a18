"""The product's own derivative, against JAX's and against float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives import FLOAT32_ERROR, check_bfloat16, check_float32, check_second, distance, random, wide
from jax.sharding import PartitionSpec
from products import equations

from vit_dist.mesh.topology import make_mesh
from vit_dist.model.activations import ACTIVATIONS, gelu
from vit_dist.model.product import product, products
from vit_dist.plan.collectives import collectives

PLAIN: dict[str, Callable[..., jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(wide(x), approximate=False).astype(x.dtype),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "swiglu": lambda gate, up: (jax.nn.silu(wide(gate)) * wide(up)).astype(up.dtype),
    "none": lambda x: x,
}
Pair = tuple[Callable[..., Any], Callable[..., Any]]


def one_product(name: str) -> Pair:
    """The product of a function's result with a kernel, and a bias, ours and written plainly."""

    def ours(*arguments: jax.Array) -> jax.Array:
        return product(arguments[:-2], arguments[-2], arguments[-1], ACTIVATIONS.get(name))

    def plain(*arguments: jax.Array) -> jax.Array:
        return PLAIN[name](*arguments[:-2]) @ arguments[-2] + arguments[-1].astype(arguments[0].dtype)

    return ours, plain


def arguments_of(name: str, inputs: int, outputs: int) -> tuple:
    x = tuple(random(4, 5, inputs, seed=seed) for seed in range(2 if name == "swiglu" else 1))
    return *x, random(inputs, outputs, seed=2), random(outputs, seed=3)


def three_products(function: Callable[..., jax.Array] | None = None) -> Pair:
    """The products of one x with three kernels, and their biases, ours and written plainly."""

    def ours(x: jax.Array, *rest: jax.Array) -> Any:
        return products((x,), rest[:3], rest[3:], function)

    def plain(x: jax.Array, *rest: jax.Array) -> Any:
        y = x if function is None else PLAIN["gelu"](x)
        return tuple(y @ kernel + bias.astype(x.dtype) for kernel, bias in zip(rest[:3], rest[3:]))

    return ours, plain


THREE = (
    random(4, 5, 16), *(random(16, 12, seed=seed) for seed in (1, 2, 3)), *(random(12, seed=seed) for seed in (4, 5, 6))
)  # fmt: skip


# The kernel's gradient is a product in either order: the narrower operand comes first.
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 24), (24, 8)])
@pytest.mark.parametrize("name", PLAIN)
def test_values_and_gradients_are_those_of_a_plain_product(name: str, inputs: int, outputs: int) -> None:
    check_float32(*one_product(name), arguments_of(name, inputs, outputs))
    check_bfloat16(*one_product(name), arguments_of(name, inputs, outputs), kept=1)


@pytest.mark.parametrize("function", [None, gelu])
def test_the_gradients_of_products_with_several_kernels_are_those_of_plain_ones(function: Any) -> None:
    check_float32(*three_products(function), THREE)
    check_bfloat16(*three_products(function), THREE, kept=3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradients_of_products_on_a_mesh_are_summed_over_tensor_once(dtype: Any) -> None:
    sizes = {"data": 2, "tensor": 4}
    splits = [PartitionSpec("data"), *[PartitionSpec(None, "tensor")] * 3, *[PartitionSpec("tensor")] * 3]
    arguments = [jnp.asarray(one, dtype if one.ndim > 1 else jnp.float32) for one in THREE]
    weights = jnp.asarray(random(4, 5, 12, seed=7), dtype)

    def gradient(function: Callable[..., Any]) -> Any:
        def score(*arguments: jax.Array) -> Any:
            return sum(jnp.sum((y * weights).astype(jnp.float32)) for y in function(*arguments))

        return jax.jit(jax.grad(score))

    ours, plain = three_products()
    with jax.set_mesh(make_mesh(sizes, jax.devices())):
        split = [jax.device_put(one, spec) for one, spec in zip(arguments, splits)]
        traced = gradient(ours).trace(*split)
        compiled = traced.lower().compile()
        found, own = compiled(*split), gradient(plain)(*split)
    # The compiler may join three sums to one. They are one as we write them, too: the products are left unreduced.
    steps = [one for one, _ in equations(traced.jaxpr.jaxpr) if one.outvars[0].aval.shape == THREE[0].shape]
    unreduced = [one for one in steps if one.outvars[0].aval.sharding.spec.unreduced == {"tensor"}]
    assert sorted(one.primitive.name for one in unreduced) == ["add"] * 2 + ["dot_general"] * 3
    assert [one.kind for one in collectives(compiled.as_text(), sizes)] == ["all-reduce"]
    exact = sum(np.float64(weights) @ np.float64(kernel).T for kernel in arguments[1:4])
    assert distance(found, exact) <= 1.02 * distance(own, exact) + FLOAT32_ERROR * np.linalg.norm(exact)


@pytest.mark.parametrize("name", PLAIN)
def test_second_derivatives_are_those_of_plain_products(name: str) -> None:
    check_second(*one_product(name), arguments_of(name, 8, 24))
    if name == "none":
        check_second(*three_products(), THREE)


def test_the_check_notices_a_derivative_that_is_off_by_a_hundredth() -> None:
    @jax.custom_vjp
    def square(x: jax.Array) -> jax.Array:
        return x * x

    square.defvjp(lambda x: (x * x, x), lambda x, g: ((2.02 * x * g).astype(x.dtype),))
    for check in (check_float32, check_bfloat16, check_second):
        check(lambda x: x * x, jnp.square, (random(64),))
        with pytest.raises(AssertionError):
            check(square, jnp.square, (random(64),))


def test_a_bias_gradient_in_bfloat16_is_summed_in_float32() -> None:
    x, kernel = jnp.asarray(random(4, 1024, 8), jnp.bfloat16), jnp.asarray(random(8, 8, seed=1), jnp.bfloat16)
    weights = 1 + random(4, 1024, 8, seed=2) / 8
    gradient = jax.grad(lambda bias: jnp.sum(product((x,), kernel, bias).astype(jnp.float32) * weights))(jnp.zeros(8))
    exact = np.asarray(jnp.asarray(weights, jnp.bfloat16), np.float64).sum((0, 1))
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, exact, rtol=1e-6)  # bfloat16 holds 8 bits: 4e-3


def test_without_a_bias_there_is_no_gradient_for_one() -> None:
    x, kernel = random(3, 4), random(4, 2)
    gradients = jax.grad(lambda x, kernel: jnp.sum(product((x,), kernel, None)), argnums=(0, 1))(x, kernel)
    np.testing.assert_allclose(gradients[1], np.broadcast_to(x.sum(0)[:, None], (4, 2)), rtol=1e-6)
