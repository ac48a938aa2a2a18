"""FLOPs by arithmetic against those of the traced program, and against the published figures."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiled import program_on
from flax import nnx
from products import products

from vit_dist import ViT, config
from vit_dist.model.flops import forward_flops, hardware_flops, recomputed_flops, training_flops

TINY: dict[str, Any] = {"width": 32, "depth": 2, "mlp": 64, "heads": 2, "num_classes": 7, "channels": 2}
MODELS: dict[str, dict[str, Any]] = {
    "cls": {"image_size": 8, "patch_size": 4},
    "mean with registers": {"image_size": (8, 12), "patch_size": (4, 2), "pool": "mean", "registers": 3},
    "map with swiglu": {
        "image_size": 8, "patch_size": 2, "pool": "map", "activation": "swiglu", "registers": 1, "pre_logits": 24
    },
    "parallel": {"image_size": 8, "patch_size": 4, "parallel": True, "qk_norm": True, "layer_scale": 0.1},
    "class token and mean, rope2d, projected": {
        "image_size": 8, "patch_size": 4, "pool": "cls_mean", "position": "rope2d", "output_projection": 20,
        "pre_logits": 12,
    },
    "no head": {"image_size": 8, "patch_size": 4, "num_classes": 0, "norm": "rmsnorm"},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_training_flops_are_those_of_the_traced_program(name: str) -> None:
    settings = {**TINY, **MODELS[name]}
    model = config.Model(**settings)
    height, width = config.pair(model.image_size)
    graph, parameters = nnx.split(nnx.eval_shape(lambda: ViT(**settings, rngs=nnx.Rngs(0))))
    images = jax.ShapeDtypeStruct((1, height, width, 2), jnp.float32)

    def logits(parameters: nnx.State, images: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, parameters)(images))

    assert products(logits, parameters, images)[1] == forward_flops(model)
    # The traced gradient includes that of the pixels, as does the rule of three times the forward pass; it is unused,
    # and the compiler removes it.
    assert products(jax.grad(logits), parameters, images)[1] == training_flops(model)
    assert training_flops(model) == 3 * forward_flops(model)


REMATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "parallel": {"parallel": True, "qk_norm": True},
    "layer scale": {"layer_scale": 0.1},
    "parallel with layer scale": {"parallel": True, "layer_scale": 0.1},
    "unrolled swiglu": {"activation": "swiglu", "scan": False},
}


@pytest.mark.parametrize("remat", ["none", "names", "block"])
@pytest.mark.parametrize("name", REMATS)
def test_hardware_flops_are_those_of_the_traced_gradient(name: str, remat: str) -> None:
    settings = {**TINY, **MODELS["cls"], **REMATS[name], "remat": remat}
    graph, parameters = nnx.split(nnx.eval_shape(lambda: ViT(**settings, rngs=nnx.Rngs(0))))

    def logits(parameters: nnx.State, images: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, parameters)(images))

    images = jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32)
    assert products(jax.grad(logits), parameters, images)[1] == hardware_flops(config.Model(**settings))


def test_recomputed_flops_depend_on_the_implementation_of_attention() -> None:
    model = config.Model(**TINY, **MODELS["cls"], remat="names")  # 2 blocks, 5 tokens of width 32
    scores = 2 * 2 * 5 * 5 * 32
    assert recomputed_flops(model, "xla") == scores
    assert recomputed_flops(model, "cudnn") == recomputed_flops(model, "chunked") == 0


def test_attention_over_split_tokens_is_not_recomputed_under_names() -> None:
    def count(remat: str) -> int:
        program = program_on({"context": 2}, f"model.remat={remat}", "model.attention_dropout=0")
        with program.in_use():
            state = program.abstract_state()
            images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
            return products(jax.grad(lambda p, x: jnp.sum(program.model(p, x))), state.parameters, images)[1]

    assert count("none") == count("names") < count("block")


@pytest.mark.parametrize(("variant", "billions"), [("Ti/16", 7.5), ("S/16", 27.6), ("B/16", 105.4), ("L/16", 369.6)])
def test_training_flops_an_image_are_the_published_ones(variant: str, billions: float) -> None:
    flops = training_flops(config.Model(variant=variant, num_classes=1000)) / 1e9  # at 224
    assert flops == pytest.approx(billions, rel=0.005)
