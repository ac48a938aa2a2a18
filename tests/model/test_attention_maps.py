"""Attention weights, and maps of them over the image, against the reference in float64."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import reference

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.mesh.topology import make_mesh
from vit_dist.model.attention_maps import attention_maps, attention_weights
from vit_dist.step.state import ModelFunction, Parameters

SIZES: dict[str, Any] = {
    "width": 16, "depth": 3, "mlp": 24, "heads": 4, "image_size": (8, 12), "patch_size": 4, "num_classes": 5,
    "activation": "gelu",
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "class token": {"pool": "cls"},
    "registers and rotation": {"pool": "cls", "registers": 3, "position": "rope2d", "layer_scale": 0.5},
    "mean": {"pool": "mean", "qk_norm": True, "parallel": True},
    "class token that is not pooled": {"pool": "mean", "class_token": True, "registers": 1},
}
IMAGES = np.random.default_rng(7).normal(size=(8, 8, 12, 3)).astype(np.float32)


def model(kind: str, scan: bool) -> tuple[config.Model, ModelFunction, Parameters]:
    """A model whose attention is far from even, with the same parameters whether they are stacked or not."""
    settings = config.resolve({"total_steps": 1, "model": {**SIZES, **KINDS[kind], "scan": True}}).model
    function, rng = ModelFunction(settings), np.random.default_rng(1)
    parameters = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.7, function.initialise(0))
    attention = parameters["blocks"]["attention"]
    for norm in (attention[name] for name in ("query_norm", "key_norm") if name in attention):
        norm |= {name: 4 * leaf for name, leaf in norm.items()}
    if scan:
        return settings, function, parameters
    settings = config.resolve({"total_steps": 1, "model": {**SIZES, **KINDS[kind], "scan": False}}).model
    blocks = {i: jax.tree.map(lambda leaf, i=i: leaf[i], parameters["blocks"]) for i in range(SIZES["depth"])}
    return settings, ModelFunction(settings), {**parameters, "blocks": blocks}


def expected_weights(kind: str) -> np.ndarray:
    settings, _, parameters = model(kind, True)
    numbers = dataclasses.asdict(settings)
    return np.stack(reference.inside(numbers, reference.flattened(parameters), IMAGES)[1], axis=1)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_softmax_of_the_references_scores(kind: str, scan: bool) -> None:
    _, function, parameters = model(kind, scan)
    found = np.asarray(jax.jit(lambda p, x: attention_weights(function.module(p), x))(parameters, IMAGES))
    expected = expected_weights(kind)
    tokens = 6 + (kind != "mean") + {"registers and rotation": 3, "class token that is not pooled": 1}.get(kind, 0)
    assert found.shape == (8, 3, 4, tokens, tokens) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert expected.max() > 0.9  # far from even, or little would be compared
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_rows_of_the_last_weights_and_of_the_product_of_all(kind: str) -> None:
    _, function, parameters = model(kind, False)
    found = jax.jit(lambda p, x: attention_maps(function.module(p), x))(parameters, IMAGES)
    weights = expected_weights(kind).mean(axis=2)
    first = weights.shape[-1] - 6
    rollout = np.stack([np.eye(weights.shape[-1])] * len(IMAGES))
    for block in range(3):  # Abnar and Zuidema 2020: A = 0.5 W + 0.5 I, the first block's at the right
        rollout = (0.5 * weights[:, block] + 0.5 * np.eye(weights.shape[-1])) @ rollout
    for name, matrix in (("rollout", rollout), ("last", weights[:, -1])):
        rows = matrix[:, :1] if KINDS[kind]["pool"] == "cls" else matrix[:, first:]
        expected = rows.mean(axis=1)[:, first:].reshape(8, 2, 3)
        np.testing.assert_allclose(found[name], expected, atol=2e-5, err_msg=name)
        assert expected.std() > 0.005


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}], ids=str)
def test_a_mesh_changes_nothing(sizes: dict[str, int]) -> None:
    _, function, parameters = model("registers and rotation", True)
    alone = jax.jit(lambda p, x: attention_maps(function.module(p), x))(parameters, IMAGES)
    with jax.set_mesh(make_mesh(sizes, jax.devices())):
        there = ModelFunction(function.settings)
        shapes = jax.eval_shape(lambda: there.initialise(0))
        split = jax.tree.map(
            lambda value, like: jax.device_put(value, jax.NamedSharding(jax.sharding.get_mesh(), like.sharding.spec)),
            parameters,
            shapes,
        )
        images = jax.device_put(IMAGES, jax.P(tuple(axis for axis in ("data", "fsdp") if axis in sizes)))
        found = jax.jit(lambda p, x: attention_maps(there.module(p), x))(split, images)
        weights = jax.jit(lambda p, x: attention_weights(there.module(p), x))(split, images)
    for name, values in alone.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(weights, expected_weights("registers and rotation"), atol=2e-5)


def test_padding_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit_dist.model.vit.kernels.padded_length", lambda *_, **__: 12)  # as for cuDNN; 10 are real
    _, function, parameters = model("registers and rotation", True)
    found = jax.jit(lambda p, x: attention_weights(function.module(p), x))(parameters, IMAGES)
    assert function.module(parameters).tokens(IMAGES).shape[1] == 12
    np.testing.assert_allclose(found, expected_weights("registers and rotation"), atol=2e-5)


def test_a_mesh_that_splits_tokens_is_refused() -> None:
    with jax.set_mesh(make_mesh({"context": 8}, jax.devices())):
        function = ModelFunction(model("mean", False)[0])
        with pytest.raises(ConfigError, match="mesh.context: attention maps need all tokens on a device"):
            jax.eval_shape(lambda: attention_maps(function.module(function.initialise(0)), IMAGES))
