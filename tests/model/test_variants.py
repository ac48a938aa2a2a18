"""Every named size and its golden parameter count, by shapes only (`nnx.eval_shape`)."""

from typing import Any

import pytest
from flax import nnx

from vit_dist import ViT
from vit_dist.config import ConfigError
from vit_dist.model import variants
from vit_dist.model.vit import parameter_count

# Every variant with its usual patch, and the parameter count with 1000 classes at 224, class-token pooling and biases.
# Sources: Ti, S, B, L, H: shared/design/NUMBERS.md, and 5.72, 22.05, 86.57 and 304.33 million in timm
# (huggingface/pytorch-image-models at aa4b5850, results/*.csv); g, G: 1012.61 and 1844.44 million there.
# The others follow from `closed_form` below; published relatives of So400m, M, giant2 and 22B are in the next table.
GOLDEN = {
    "mu": (16, 76_712),
    "Ti": (16, 5_717_416),
    "S": (16, 22_050_664),
    "S+": (16, 29_146_984),
    "M": (16, 38_837_736),
    "B": (16, 86_567_656),
    "L": (16, 304_326_632),
    "So400m": (14, 413_597_656),
    "H": (14, 632_045_800),
    "H+": (16, 842_078_440),
    "g": (14, 1_012_611_432),
    "g-opt": (14, 1_136_101_864),
    "G": (14, 1_844_440_680),
    "G-opt": (14, 1_664_842_216),
    "e": (14, 3_807_214_312),
    "7B": (16, 6_721_082_344),
    "22B": (14, 21_757_889_512),
    "giant2": (14, 1_136_183_784),
}

# Counts in millions that timm publishes for models without a head; ours have a head of one class (`width + 1` more).
HEADLESS: dict[str, tuple[str, int, dict[str, Any], float]] = {
    "vit_huge_patch14_gap_224": ("H/14", 1280, {"pool": "mean"}, 630.76),
    "vit_giant_patch16_gap_224": ("g/16", 1408, {"pool": "mean"}, 1011.37),
    "vit_so400m_patch14_siglip_gap_224": ("So400m/14", 1152, {"pool": "mean"}, 412.44),
    "vit_so400m_patch14_siglip_224": ("So400m/14", 1152, {"pool": "map"}, 427.68),
    "vit_giant_patch14_dinov2": ("giant2/14", 1536, {"image_size": 518, "layer_scale": 1e-5}, 1136.48),
}

# Parameters of timm 1.0.31's vit_{small,small_plus,base,large,huge_plus,7b}_patch16_dinov3, counted there.
DINOV3 = {
    "S/16": 21_586_944, "S+/16": 28_683_264, "B/16": 85_641_216, "L/16": 303_079_424, "H+/16": 840_509_440,
    "7B/16": 6_716_030_976,
}  # fmt: skip


def count(variant: str | None = None, **settings: Any) -> int:
    return parameter_count(nnx.eval_shape(lambda: ViT(variant, rngs=nnx.Rngs(0), **settings)))


def closed_form(width: int, depth: int, mlp: int, patch: int, *, mlp_matrices: int = 2, block_norms: int = 2) -> int:
    """Parameters of a plain ViT at 224 with 1000 classes, written down from the paper's equations."""
    tokens = (224 // patch) ** 2 + 1
    embedding = (3 * patch**2 + 1) * width + width + tokens * width
    attention = 4 * (width * width + width)
    hidden = mlp_matrices * width * mlp + (mlp_matrices - 1) * mlp + width
    return embedding + depth * (attention + hidden + block_norms * 2 * width) + 2 * width + (width + 1) * 1000


def test_every_variant_states_its_golden_count() -> None:
    assert set(GOLDEN) == set(variants.VARIANTS)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_variant_has_its_golden_count(name: str) -> None:
    patch, golden = GOLDEN[name]
    assert count(f"{name}/{patch}", num_classes=1000) == golden


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_count_agrees_with_the_closed_form(name: str) -> None:
    patch, golden = GOLDEN[name]
    size = variants.VARIANTS[name]
    assert size.width and size.depth and size.mlp and size.heads
    mlp_matrices = 3 if size.activation == "swiglu" else 2
    expected = closed_form(
        size.width, size.depth, size.mlp, patch, mlp_matrices=mlp_matrices, block_norms=1 if size.parallel else 2
    )
    if size.qk_norm:
        expected += size.depth * 2 * (size.width // size.heads)
    assert golden == expected


@pytest.mark.parametrize("name", HEADLESS)
def test_counts_agree_with_those_that_timm_publishes(name: str) -> None:
    variant, width, settings, millions = HEADLESS[name]
    assert round((count(variant, num_classes=1, **settings) - width - 1) / 1e6, 2) == millions


@pytest.mark.parametrize(("variant", "parameters"), DINOV3.items())
def test_counts_of_dinov3_are_those_of_timm(variant: str, parameters: int) -> None:
    settings: dict[str, Any] = {"position": "rope2d", "registers": 4, "class_token": True, "pool": "mean"}
    found = count(variant, **settings, qkv_bias=False, layer_scale=1e-5, num_classes=0)
    assert found == parameters


def test_m16_with_mean_pooling_agrees_with_timm() -> None:
    # vit_medium_patch16_gap_256: no qkv bias, LayerScale; 38.86 million with 1000 classes.
    parameters = count("M/16", image_size=256, pool="mean", qkv_bias=False, layer_scale=1e-6, num_classes=1000)
    assert round(parameters / 1e6, 2) == 38.86


def test_the_kernels_of_22b_are_the_21743_million_of_its_paper() -> None:
    # Dehghani et al. 2023, table 1: 48 blocks of 12 x 6144^2; biases, embeddings and a head are less than 0.1 % more.
    model = nnx.eval_shape(lambda: ViT("22B/14", num_classes=1, rngs=nnx.Rngs(0)))
    blocks = nnx.to_flat_state(nnx.state(model.blocks, nnx.Param))
    assert sum(leaf.size for path, leaf in blocks if path[-1] == "kernel") // 10**6 == 21_743


def test_other_golden_counts() -> None:
    assert count("B/32", num_classes=1000) == 88_224_232
    assert count("S/16", num_classes=1000, pool="mean") == 22_049_896


def test_the_lessons_model_has_6457866_parameters() -> None:
    lesson: dict[str, Any] = {"width": 512, "depth": 2, "mlp": 2048, "heads": 8}
    lesson |= {"image_size": 96, "patch_size": 16, "channels": 1, "num_classes": 10}
    assert count(**lesson, qkv_bias=False, projection_bias=False) == 6_457_866


def test_a_number_of_the_config_wins_over_the_variants() -> None:
    base = count("Ti/16", num_classes=1000)
    assert count("Ti/16", num_classes=1000, depth=11) == base - (12 * 192**2 + 13 * 192)
    assert count("Ti/16", num_classes=1000, patch_size=32) == base + 3 * 192 * (32**2 - 16**2) - 192 * (14**2 - 7**2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Bi/16", "model.variant: 'Bi' is none of"),
        ("B", "model.variant: 'B' names no patch size; write it like B/16"),
        ("B/0", "model.variant: 'B/0' names no patch size"),
        ("B/x", "model.variant: 'B/x' names no patch size"),
    ],
)
def test_a_name_of_no_variant_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        variants.parse(name)
