"""cuDNN's attention beside XLA's, in value and in gradient, for even and odd numbers of tokens, and within a model.

All are compared with float32 on the same bf16 inputs, by |a - reference| / |reference|. On a CPU, in a dry run, XLA's
stands in for cuDNN's. Memory that the kernels get is filled with NaN before, as it would show what they do not write.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from visit.job import GPU, Job
from vit_dist.model.attention import attend
from vit_dist.model.vit import ViT

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


def in_model(job: Job) -> None:
    """Keeps the errors of a small model's gradient, whose class token makes the number of tokens odd.

    It holds a token of padding from the embedding on. What cuDNN leaves in the rows of padding must not reach the
    gradient of any parameter.
    """
    told, fast = job.arguments, "cudnn" if job.device().platform in GPU else "xla"
    reference = gradient("xla", "float32", told)
    errors = {name: worst(gradient(name, "bfloat16", told), reference) for name in (fast, "xla")}
    job.keep(errors=errors)
    found, beside = errors[fast], errors["xla"]
    claim = "the worst parameter's gradient with a token of padding"
    job.check(claim, found <= max(2 * _ENOUGH, _WORSE * beside), f"error {found:.1e}, XLA's {beside:.1e}")


def gradient(attention: str, dtype: str, told: dict[str, Any]) -> dict[str, np.ndarray]:
    """The gradient of a model's random function of its logits, by parameter."""
    sizes: dict[str, Any] = {
        name: told[name] for name in ("width", "depth", "mlp", "heads", "image_size", "patch_size")
    }
    settings: dict[str, Any] = {
        "num_classes": 16,
        "head_zero_init": False,
        "pool": "cls",
        "scan": False,
        "kernel_init": "xavier_uniform",
    }
    precision = "highest" if dtype == "float32" else "default"
    images = jax.random.normal(jax.random.key(1), (told["examples"], sizes["image_size"], sizes["image_size"], 3))
    model = ViT(rngs=nnx.Rngs(0), attention=attention, dtype=dtype, **sizes, **settings)
    graph, state = nnx.split(model)
    weights = jax.random.normal(jax.random.key(2), (told["examples"], 16))

    @jax.jit
    def gradients(state: Any, images: jax.Array) -> Any:
        return jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(images) * weights))(state)

    with jax.default_matmul_precision(precision):
        compiled = gradients.lower(state, images).compile()
        _spoil()
        found = compiled(state, images)
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in jax.tree.leaves_with_path(found)}


def worst(found: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    """The largest relative error of a parameter's gradient; no number if one of them is none."""
    norm = np.linalg.norm
    return float(np.max([norm(found[name] - reference[name]) / norm(reference[name]) for name in reference]))


def _spoil() -> None:
    """Fills 2 GiB of the device's memory with NaN, and frees it."""
    jax.block_until_ready([jnp.full((2**25,), jnp.nan, jnp.float32) for _ in range(16)])


def outputs(
    implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Attention of [B, N, H, d], and the gradients of its sum with these weights by q, k and v."""

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array) -> Any:
        mixed, pull = jax.vjp(lambda q, k, v: attend(q, k, v, implementation), q, k, v)
        return mixed, *pull(weights)

    compiled = both.lower(q, k, v, weights).compile()
    _spoil()
    return compiled(q, k, v, weights)


def _errors(found: tuple[jax.Array, ...], reference: tuple[jax.Array, ...]) -> dict[str, float]:
    arrays = [[np.asarray(one, np.float64) for one in side] for side in (found, reference)]
    return {name: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for name, a, b in zip(NAMES, *arrays, strict=True)}
