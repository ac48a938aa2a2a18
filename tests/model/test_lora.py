"""Adapters beside kernels: the same function, and the same gradients, as of kernels to which they are added."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_dist.config import Lora, Model
from vit_dist.step.state import ModelFunction

SIZES: dict[str, Any] = {
    "width": 16, "depth": 2, "mlp": 24, "heads": 2, "image_size": 8, "patch_size": 4, "num_classes": 5,
    "head_zero_init": False, "layer_scale": 0.5, "position_std": 0.5,
}  # fmt: skip
LORA = Lora(rank=3, alpha=6.0)
FACTOR = 2.0


def drawn(function: ModelFunction) -> Any:
    """Parameters none of which is zero."""
    leaves, structure = jax.tree.flatten(function.initialise(0))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten(leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys))


def with_adapters_added(tree: Any, stacked: bool) -> Any:
    """The tree without adapters, each kernel plus twice the product of A [*inputs, r] and B [r, *outputs]."""
    if not isinstance(tree, dict):
        return tree
    kept = {key: with_adapters_added(leaf, stacked) for key, leaf in tree.items() if key != "lora"}
    if "lora" in tree:
        down, up = (tree["lora"][part]["kernel"] for part in ("down", "up"))
        lead, rank = ("l" if stacked else ""), "z"
        ins = "ab"[: down.ndim - 1 - len(lead)]
        outs = "cdef"[: up.ndim - 1 - len(lead)]
        product = jnp.einsum(f"{lead}{ins}{rank},{lead}{rank}{outs}->{lead}{ins}{outs}", down, up)
        kept["kernel"] = tree["kernel"] + FACTOR * product
    return kept


def assert_close(found: jax.Array, expected: jax.Array, name: str = "") -> None:
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=2e-5 * scale, rtol=2e-4, err_msg=name)


@pytest.mark.parametrize(("scan", "activation"), [(True, "gelu"), (False, "gelu"), (True, "swiglu")])
def test_an_adapted_model_is_that_of_the_sums_in_value_and_gradient(scan: bool, activation: str) -> None:
    model = Model(**SIZES, scan=scan, activation=activation)  # type: ignore[arg-type]
    adapted, plain = ModelFunction(model, LORA), ModelFunction(model)
    parameters = drawn(adapted)
    images = jax.random.normal(jax.random.key(2), (3, 8, 8, 3))
    key = jax.random.key(3)

    def loss(function: ModelFunction, parameters: Any) -> jax.Array:
        return jnp.sum(jnp.sin(function(parameters, images, key)))

    assert_close(adapted(parameters, images), plain(with_adapters_added(parameters, scan), images))
    found = jax.jit(jax.grad(lambda tree: loss(adapted, tree)))(parameters)
    expected = jax.jit(jax.grad(lambda tree: loss(plain, with_adapters_added(tree, scan))))(parameters)
    for (path, leaf), wanted in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert_close(leaf, wanted, jax.tree_util.keystr(path))


def test_only_the_targets_have_adapters_and_a_new_model_is_unchanged_by_them() -> None:
    model = Model(**SIZES, scan=True)
    adapted = ModelFunction(model, Lora(rank=2, targets=("qkv", "mlp")))
    tree = adapted.initialise(0)
    paths = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)}
    layers = {path.split("/lora/")[0] for path in paths if "/lora/" in path}
    assert layers == {"blocks/attention/qkv", "blocks/mlp/up", "blocks/mlp/down"}
    images = jax.random.normal(jax.random.key(2), (3, 8, 8, 3))
    np.testing.assert_array_equal(
        adapted(tree, images), ModelFunction(model)(ModelFunction(model).initialise(0), images)
    )
