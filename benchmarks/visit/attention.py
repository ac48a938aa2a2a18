"""cuDNN's attention beside XLA's, in value and in gradient, for even and odd numbers of tokens.

Both are compared with attention in float32 on the same bf16 inputs, by |a - reference| / |reference|. On a CPU, in a
dry run, XLA's stands in for cuDNN's.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from visit.job import GPU, Job
from vit_dist.model.attention import attend

NAMES = ("output", "query", "key", "value")  # and the gradients of these three
_ENOUGH = 1e-2  # an error of bf16 operands
_WORSE = 2.0  # times XLA's own error


def run(job: Job) -> None:
    """Keeps the errors of both, for each number of tokens."""
    told, fast = job.arguments, "cudnn" if job.device().platform in GPU else "xla"
    title = "cuDNN" if fast == "cudnn" else "XLA in place of cuDNN"
    errors: dict[str, Any] = {}
    for number, tokens in enumerate(told["tokens"]):
        shape = told["examples"], tokens, told["heads"], told["head_size"]
        drawn = [jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(number), 4)]
        with jax.default_matmul_precision("highest"):
            reference = outputs("xla", *(one.astype(jnp.float32) for one in drawn))
        ours = {"cudnn": outputs(fast, *drawn), "xla": outputs("xla", *drawn)}
        errors[str(tokens)] = both = {name: _errors(found, reference) for name, found in ours.items()}
        job.keep(errors=errors)
        for name in NAMES:
            found, beside = both["cudnn"][name], both["xla"][name]
            claim = f"{title}: {name if name == 'output' else f'gradient of {name}'}, {tokens} tokens"
            job.check(claim, found <= max(_ENOUGH, _WORSE * beside), f"error {found:.1e}, XLA's {beside:.1e}")


def outputs(
    implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Attention of [B, N, H, d], and the gradients of its sum with these weights by q, k and v."""

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array) -> Any:
        mixed, pull = jax.vjp(lambda q, k, v: attend(q, k, v, implementation), q, k, v)
        return mixed, *pull(weights)

    return both(q, k, v, weights)


def _errors(found: tuple[jax.Array, ...], reference: tuple[jax.Array, ...]) -> dict[str, float]:
    arrays = [[np.asarray(one, np.float64) for one in side] for side in (found, reference)]
    return {name: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for name, a, b in zip(NAMES, *arrays, strict=True)}
