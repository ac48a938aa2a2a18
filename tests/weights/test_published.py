"""Published weights become our model: the outputs of their own libraries, and what is wrong with a file by name."""

import golden_weights
import numpy as np
import pytest
from golden_weights import NAMES, fixture
from peers.compare import PREPARED, TOLERANCE, errors

from vit_dist.config import ConfigError
from vit_dist.load import load
from vit_dist.weights.published import open_published


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_their_own_library(name, tmp_path):
    golden = fixture(name)
    expected = golden_weights.outputs(golden)
    expected.pop("pooler_output", None)  # of ViTModel, a further layer that is left out
    found = errors(golden_weights.write(golden, tmp_path), golden_weights.images(golden), expected)
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("hf_vit_model", ["pooler.dense.bias", "pooler.dense.weight"]),
        ("hf_clip_classifier", ["vision_model.post_layernorm.bias", "vision_model.post_layernorm.weight"]),
        ("npz_augreg_checkpoint", [f"opt/state/param_states/embedding/{kind}" for kind in ("bias", "kernel")]),
        ("npz_big_vision_checkpoint", [f"opt/0/mu/embedding/{kind}" for kind in ("bias", "kernel")]),
        ("npz_big_vision_siglip_bf16", ["params/b", "params/t", "params/txt/head/kernel"]),
        ("meta_dinov3", [*(f"blocks.{i}.attn.qkv.bias_mask" for i in range(3)), "mask_token", "rope_embed.periods"]),
        ("npz_augreg_in21k", []),
    ],
)
def test_what_is_left_out_is_listed(name, tensors, tmp_path):
    assert list(open_published(golden_weights.write(fixture(name), tmp_path)).left_out) == tensors


def test_counts_of_positions_that_old_files_hold_are_left_out(tmp_path):
    golden = fixture("hf_clip_projection")
    count = {"vision_model.embeddings.position_ids": np.arange(10)[None]}
    file = golden_weights.write(golden, tmp_path, golden_weights.tensors(golden) | count)
    assert open_published(file).left_out == ("vision_model.embeddings.position_ids",)


@pytest.mark.parametrize("key", ["model.image_size", "data.mean", "data.std"])
def test_what_meta_does_not_say_names_the_key_to_set(key, tmp_path):
    file = golden_weights.write(fixture("meta_dinov3"), tmp_path)
    given = {name: value for name, value in ({"model.image_size": 48} | PREPARED).items() if name != key}
    with pytest.raises(ConfigError, match=f"model.safetensors: does not say .*; set {key}$"):
        load(file, overrides=given)


@pytest.mark.parametrize("path", ["pos_embedding", "Transformer/pos_embedding"])
def test_older_code_has_a_position_for_the_class_token_under_other_names(path, tmp_path):
    golden = fixture("npz_augreg")
    tensors = golden_weights.tensors(golden)
    tensors[path] = tensors.pop("Transformer/posembed_input/pos_embedding")
    file = golden_weights.write(golden, tmp_path, tensors)
    found = errors(file, golden_weights.images(golden), golden_weights.outputs(golden))
    assert max(found.values()) <= TOLERANCE, found


def test_vision_transformer_computes_no_positions(tmp_path):
    golden = fixture("npz_augreg")
    tensors = golden_weights.tensors(golden)
    del tensors["Transformer/posembed_input/pos_embedding"]
    with pytest.raises(ConfigError, match="tensor Transformer/posembed_input/pos_embedding is missing"):
        open_published(golden_weights.write(golden, tmp_path, tensors))


def test_computed_positions_need_the_size_of_images(tmp_path):
    file = golden_weights.write(fixture("npz_big_vision_sincos"), tmp_path)
    with pytest.raises(ConfigError, match=r"model.npz: does not say the size of its images; set model.image_size$"):
        load(file)


@pytest.mark.parametrize(
    ("periods", "problem"),
    [
        (10_000 ** (np.arange(4) / 4), "holds other periods than those of base 100"),
        (100 ** (np.arange(5) / 5), "has 5 periods, which are of no heads of a width of 64"),
        (np.zeros((2, 2)), r"has the shape \[2, 2\], expected 1 axes"),
        (None, "is missing; it tells the model's size"),
    ],
)
def test_periods_that_are_not_dinov3s_are_an_error(periods, problem, tmp_path):
    golden = fixture("meta_dinov3")
    tensors = golden_weights.tensors(golden)
    del tensors["rope_embed.periods"]
    if periods is not None:
        tensors["rope_embed.periods"] = np.asarray(periods, np.float32)
    with pytest.raises(ConfigError, match=f"tensor rope_embed.periods {problem}"):
        open_published(golden_weights.write(golden, tmp_path, tensors))


def test_siglip_classifies_the_mean_of_patches_though_it_has_a_pooling_head(tmp_path):
    golden, headed = fixture("hf_siglip_classifier"), golden_weights.tensors(fixture("hf_siglip"))
    del golden["config"]["vision_config"]["vision_use_head"]  # as in published files: true
    head = {f"vision_model.{name}": array for name, array in headed.items() if name.startswith("head.")}
    file = golden_weights.write(golden, tmp_path, golden_weights.tensors(golden) | head)
    found = errors(file, golden_weights.images(golden), golden_weights.outputs(golden))
    assert max(found.values()) <= TOLERANCE, found
    assert set(open_published(file).left_out) == set(head)


NAMES_OF_TEN = [f"bird {number}" for number in range(10)]


@pytest.mark.parametrize("labels", [NAMES_OF_TEN, {str(number): name for number, name in enumerate(NAMES_OF_TEN)}])
def test_timm_names_its_classes_at_the_top_of_its_config(labels, tmp_path):
    golden = fixture("timm_vit_cls")
    golden["config"]["label_names"] = labels
    assert open_published(golden_weights.write(golden, tmp_path)).description.classes == tuple(NAMES_OF_TEN)


def test_as_many_names_as_classes_are_needed(tmp_path):
    golden = fixture("timm_vit_cls")
    golden["config"]["label_names"] = [*NAMES_OF_TEN, "one more"]
    with pytest.raises(ConfigError, match="11 names of classes, but its head has 10; correct them"):
        open_published(golden_weights.write(golden, tmp_path))


def test_names_of_tensors_tell_more_than_a_config_beside_them(tmp_path):
    golden_weights.write(fixture("hf_clip_full"), tmp_path)
    file = golden_weights.write(fixture("open_clip_gelu"), tmp_path)
    assert open_published(file).description.family == "OpenCLIP"
