"""The MLP's activations, computed in float32 (except the value of `gelu_tanh`), in the dtype of their input.

They are written for what the compilers make of them, not only for their values. XLA's GPU compiler takes an `erfc` or
`tanh` for so expensive that it stores it rather than computing it twice, in the value and in the derivative of one
kernel.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function of x (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(math.sqrt(0.5) * wide))).astype(x.dtype)


@jax.custom_jvp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """The approximation of GELU by tanh; cuBLAS computes this very expression at the end of a product.

    In bfloat16 the value is JAX's own, rounded after every operation that the compiler does not fuse with the next.
    """
    return jax.nn.gelu(x, approximate=True)


@gelu_tanh.defjvp
def _gelu_tanh_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    def by_logistic(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        inner = math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3)
        return (wide * jax.lax.logistic(inner)).astype(x.dtype)  # (1 + tanh z) / 2 is the logistic function of 2 z

    return jax.jvp(by_logistic, primals, tangents)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x times the logistic function of 1.702 x, an approximation of GELU in OpenAI's CLIP (arXiv:2103.00020)."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.logistic(1.702 * wide)).astype(x.dtype)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202)."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)


ACTIVATIONS: dict[str, Callable[..., jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "swiglu": swiglu,
}  # `model.activation`
