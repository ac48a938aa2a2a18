"""Models of ours become the files of other libraries: bit by bit where these can express them, else an error."""

import functools

import golden_weights
import numpy as np
import pytest
from filled_model import filled
from golden_weights import NAMES, fixture
from peers import random_weights

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.weights import writing
from vit_dist.weights.description import Subject
from vit_dist.weights.lazy import stored
from vit_dist.weights.origin import Origin
from vit_dist.weights.published import open_published, shapes_of, understood
from vit_dist.weights.stored_tensor import in_memory
from vit_dist.weights.timm_architectures import model_keys, table
from vit_dist.weights.timm_config import architecture_of, differing

OWN = {"timm": "timm", "hf": "huggingface", "npz": "npz"}  # the format of a fixture, by its name
# Read as the sum of a token and a position that ours has no row for: the sum is written, and zeros.
SUMS = {
    "timm_vit_registers_with_positions": {"reg_token", "pos_embed"},
    "timm_vit_registers_map": {"reg_token", "pos_embed"},
    "hf_deit": {"deit.embeddings.distillation_token", "deit.embeddings.position_embeddings"},
}
# Fixtures under older or newer names, stacked, or with other parts beside them: written under the usual names.
OTHER_NAMES = ("_new_names", "_old_names", "_stacked", "_stacked_bf16", "_checkpoint", "_full", "_short_config")
PREFIXES = {"npz_big_vision_sincos": ("", "params/"), "npz_big_vision_siglip_bf16": ("params/img/", "params/")}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Returns the model of a fixture, by its name."""

    @functools.cache
    def read(name):
        published = open_published(golden_weights.write(fixture(name), tmp_path_factory.mktemp(name)))
        parameters = {path: lazy.read() for path, lazy in published.parameters.items()}
        size = {"model": {**vars(published.model), "image_size": fixture(name)["images"][1:3]}}
        model = config.resolve({"total_steps": 1, **size}).model
        left_out = set(published.left_out)
        return Subject(model, config.Data(), parameters, published.description.classes or ()), left_out

    return read


@functools.cache
def files(subject_of, name, format):
    return writing.files_of(subject_of(name)[0], format)


@pytest.mark.parametrize("name", [name for name in NAMES if name.partition("_")[0] in OWN])
def test_a_file_that_was_read_is_written_again_bit_by_bit(name, subject):
    written = files(subject, name, OWN[name.partition("_")[0]]).tensors
    original = {path: array.astype(np.float32) for path, array in golden_weights.tensors(fixture(name)).items()}
    expected = {path: array for path, array in original.items() if path not in subject(name)[1]}
    if name.endswith(OTHER_NAMES):
        return  # `test_every_file_is_read_as_the_model_that_was_written` holds for these
    old, new = PREFIXES.get(name, ("", ""))
    expected = {new + path.removeprefix(old): array for path, array in expected.items()}
    unused = subject(name)[1] & written.keys()
    wanted = {**expected, **{path: original[path] for path in unused}}
    assert {path: array.shape for path, array in written.items()} == {
        path: array.shape for path, array in wanted.items()
    }
    differing = {path for path, array in expected.items() if not np.array_equal(written[path], array)}
    assert differing - unused == SUMS.get(name, set())


@pytest.mark.parametrize(
    ("name", "format"),
    [
        (name, format)
        for number, name in enumerate(NAMES)
        for format in writing.FORMATS
        if number % 4 == 0 or format in ("safetensors", OWN.get(name.partition("_")[0]))  # `make peers` tries all
    ],
)
def test_every_file_is_read_as_the_model_that_was_written(name, format, subject):
    try:
        found = files(subject, name, format)
    except ConfigError as error:
        assert format != OWN.get(name.partition("_")[0])
        assert format != "safetensors"
        assert str(error).startswith("model.")
        return
    read = understood(Origin(in_memory(found.tensors), found.configs, (golden_weights.FOLDER / found.weights_file,)))
    parameters = {path: lazy.read() for path, lazy in read.parameters.items()}
    assert parameters.keys() == found.written.parameters.keys()
    for path, array in found.written.parameters.items():
        np.testing.assert_array_equal(parameters[path], array, err_msg=path)
    if format == "safetensors":
        assert found.written.parameters is subject(name)[0].parameters


def test_every_architecture_of_timm_is_found_by_what_it_is():
    rows = [name for rows in table()["architectures"].values() for name in rows if name not in table()["unsupported"]]
    assert len(rows) > 150
    for name in rows[::4]:
        without = {"rope_base": 100.0, "output_projection": None, "pre_logits": None}
        traits = without | model_keys({"architecture": name})
        found = architecture_of(traits)
        assert differing(model_keys(found), traits) == [], name
        assert found["model_args"] == {}, name


SMALL = {"width": 32, "depth": 2, "mlp": 64, "heads": 4, "image_size": 32, "patch_size": 16, "num_classes": 5}


def model_of(**keys):
    """A small model with random numbers."""
    model = config.resolve({"total_steps": 1, "model": {**SMALL, "scan": False, **keys}}).model

    def numbers(path, shape):
        x = random_weights.normal(path, shape)
        return np.asarray(0.8 + 0.2 * x if path.endswith("scale") else 0.1 * x, np.float32)

    return Subject(model, config.Data(), {path: numbers(path, shape) for path, shape in shapes_of(model).items()})


def outputs(subject):
    parameters = {name: stored(tensor) for name, tensor in in_memory(subject.parameters).items()}
    return np.asarray(filled(subject.model, parameters)(random_weights.images(2, 32, 32)))


@pytest.mark.parametrize(
    ("format", "keys", "changed"),
    [
        ("timm", {"position": "sincos2d"}, {"position": "learned"}),
        ("huggingface", {"position": "none"}, {"position": "learned", "cls_position": True}),
        ("huggingface", {"cls_position": False}, {"cls_position": True}),
        ("huggingface", {"registers": 4}, {"layer_scale": 1.0, "pool": "cls_mean"}),
        ("huggingface", {"pool": "mean", "class_token": True}, {"layer_scale": 1.0, "pool": "cls_mean"}),
        ("huggingface", {"pool": "mean", "layer_scale": 0.1}, {"layer_scale": None}),
        ("huggingface", {"projection_bias": False, "qkv_bias": False, "pool": "mean"}, {"qkv_bias": True}),
        ("timm", {"embedding_norm": "tokens", "norm_epsilon": 1e-5}, {}),  # without a bias of patches
        ("timm", {"output_projection": 24, "num_classes": 0}, {"num_classes": 24, "output_projection": None}),
        ("timm", {"output_projection": 24}, {"num_classes": 5, "output_projection": None}),
    ],
    ids=str,
)
def test_a_format_without_the_model_gets_one_that_computes_the_same(format, keys, changed):
    ours = model_of(**keys)
    written = writing.files_of(ours, format).written
    for key, value in changed.items():
        assert getattr(written.model, key) == value
    found, expected = outputs(written), outputs(ours)
    assert np.abs(found - expected).max() / expected.std() <= 1e-5
    assert written.parameters is not ours.parameters or "embedding_norm" in keys


@pytest.mark.parametrize(
    ("format", "keys", "error"),
    [
        ("huggingface", {"norm": "rmsnorm"}, "model.norm: rmsnorm, which transformers cannot express"),
        ("huggingface", {"qk_norm": True}, "model.qk_norm: True, which transformers cannot express"),
        ("huggingface", {"pool": "map"}, "model.pool: map, which transformers cannot express: .* has mean"),
        ("huggingface", {"pre_logits": 8}, "model.pre_logits: 8, which transformers cannot express"),
        ("huggingface", {"position": "rope2d"}, "model.num_classes: 5, but transformers has no classifier with"),
        ("timm", {"norm_epsilon": 1e-12}, "model.norm_epsilon: 1e-12, which timm cannot express: .* has 1e-06"),
        ("timm", {"pool": "cls_mean"}, "model.pool: cls_mean, which timm cannot express: the nearest"),
        ("timm", {"pre_logits": 8}, "model.pre_logits: 8, which timm cannot express: .* has none"),
        ("npz", {}, "model.activation: gelu, which big_vision and vision_transformer cannot express"),
        ("npz", {"activation": "gelu_tanh", "registers": 2}, "model.registers: 2, which big_vision and"),
        ("npz", {"activation": "gelu_tanh", "image_size": (32, 64)}, "model.image_size: 2x4 patches, but big_vision's"),
    ],
    ids=str,
)
def test_what_a_format_cannot_express_names_the_key_and_its_value(format, keys, error):
    with pytest.raises(ConfigError, match=f"^{error}.*; export --format="):
        writing.files_of(model_of(**keys), format)


def test_a_crop_that_transformers_does_not_do_names_the_key():
    ours = model_of()
    border = Subject(ours.model, config.Data(eval_crop_mode="border", eval_crop=0.9), ours.parameters)
    with pytest.raises(ConfigError, match="^data.eval_crop_mode: border, which no processor of transformers does"):
        writing.files_of(border, "huggingface")
    assert writing.files_of(border, "timm").configs["config.json"]["pretrained_cfg"]["crop_mode"] == "border"


def test_a_number_that_has_no_tensor_names_the_parameter():
    norms = {"norm": "rmsnorm", "norm_epsilon": 1e-5, "embedding_norm": "patches", "pool": "mean"}
    ours = model_of(activation="swiglu", qkv_bias=False, projection_bias=False, **norms)
    with pytest.raises(ConfigError, match=r"^blocks/0/mlp/down/bias: is not zero, .* \(timm\); export --format=safe"):
        writing.files_of(ours, "timm")


def test_two_scales_that_timm_has_one_tensor_for_must_be_equal():
    ours = model_of(parallel=True, layer_scale=0.1)
    with pytest.raises(ConfigError, match="^blocks/0/scale2/scale: differs from blocks/0/scale1/scale"):
        writing.files_of(ours, "timm")
    equal = {path: ours.parameters[path.replace("scale2", "scale1")] for path in ours.parameters}
    assert "blocks.0.ls.gamma" in writing.files_of(Subject(ours.model, ours.data, equal), "timm").tensors


def test_biases_of_keys_that_training_has_changed_are_kept():
    ours = model_of(position="rope2d", registers=2, num_classes=0, layer_scale=1.0, norm_epsilon=1e-5)
    assert ours.has_key_biases()
    timm, theirs = (writing.files_of(ours, format) for format in ("timm", "huggingface"))
    assert timm.tensors["blocks.0.attn.qkv.bias"].any()
    bias = ours.parameters["blocks/1/attention/qkv/bias"][1].reshape(-1)
    np.testing.assert_array_equal(theirs.tensors["layer.1.attention.k_proj.bias"], bias)
    np.testing.assert_array_equal(timm.tensors["blocks.1.attn.qkv.bias"][32:64], bias)


def test_classes_and_images_are_told_as_the_libraries_name_them():
    names = ("a cat", "a dog", "a fox", "a hen", "an owl")
    data = config.Data(mean=(0.1, 0.2, 0.3), std=0.5, interpolation="bicubic", eval_crop=0.875, eval_crop_mode="center")
    ours = Subject(model_of().model, data, model_of().parameters, names, "apache-2.0")
    timm = writing.files_of(ours, "timm").configs["config.json"]
    assert timm["label_names"] == list(names) and timm["num_classes"] == 5
    assert timm["pretrained_cfg"] == {
        "custom_load": False, "input_size": [3, 32, 32], "fixed_input_size": True, "interpolation": "bicubic",
        "crop_pct": 0.875, "crop_mode": "center", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "num_classes": 5,
        "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head", "license": "apache-2.0",
    }  # fmt: skip
    theirs = writing.files_of(ours, "huggingface").configs
    assert theirs["config.json"]["id2label"] == {str(number): name for number, name in enumerate(names)}
    assert theirs["config.json"]["label2id"]["a fox"] == 2
    processor = theirs["preprocessor_config.json"]
    assert processor["size"] == {"shortest_edge": 36} and processor["crop_size"] == {"height": 32, "width": 32}
    assert processor["image_mean"] == [0.1, 0.2, 0.3] and processor["resample"] == 3
