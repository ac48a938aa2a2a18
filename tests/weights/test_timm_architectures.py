"""timm's config.json as keys of our config, beside what the modules of timm's own models show."""

import json
import pathlib

import pytest

from vit_dist.config import ConfigError
from vit_dist.weights.timm_architectures import model_keys, table

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden/timm_keys.json").read_text())


def _config(row: list) -> dict:
    name, arguments, implied, _ = row
    return {"architecture": name, "model_args": arguments, "pretrained_cfg": implied}


def _expected(row: list) -> dict:
    return GOLDEN["base"] | row[3]


def _found(row: list) -> dict:
    keys = json.loads(json.dumps(model_keys(_config(row))))
    return keys | {"layer_scale": keys["layer_scale"] is not None}


def test_the_arguments_of_each_architecture_say_what_the_modules_of_its_model_show():
    rows = [row for row in GOLDEN["models"] if isinstance(row[3], dict)]
    assert len(rows) > 200
    wrong = [row[:2] for row in rows if _found(row) != _expected(row)]
    assert not wrong


def test_what_our_model_cannot_be_is_refused():
    rows = [row for row in GOLDEN["models"] if isinstance(row[3], list)]
    assert len(rows) > 30
    for row in rows:
        with pytest.raises(ConfigError, match="config.json"):
            model_keys(_config(row))


def test_152_of_the_163_plain_vits_of_timm_are_representable():
    assert table()["timm"] == GOLDEN["timm"] == "1.0.31"
    deit = [name for name in table()["architectures"]["VisionTransformer"] if name.startswith("deit")]
    plain = table()["architectures"]["VisionTransformer"].keys() - set(deit)
    assert len(plain) == 163
    assert len(plain - table()["unsupported"].keys()) == 152


@pytest.mark.parametrize("name", [None, "resnet50", ["vit"]])
def test_an_unknown_architecture_is_named(name):
    with pytest.raises(ConfigError, match="architecture"):
        model_keys({"architecture": name})


def test_an_argument_that_is_not_known_is_named():
    with pytest.raises(ConfigError, match=r"model_args\.use_naflex"):
        model_keys({"architecture": "vit_base_patch16_224", "model_args": {"use_naflex": True}})


@pytest.mark.parametrize(
    "config",
    [
        {"model_args": []},
        {"model_args": {"img_size": "224"}},
        {"model_args": {"img_size": [224, 0]}},
        {"model_args": {"img_size": True}},
        {"model_args": {"depth": 12.5}},
        {"model_args": {"mlp_ratio": float("nan")}},
        {"model_args": {"norm_layer": ["layernorm"]}},
        {"model_args": {"norm_layer": {"layernorm": 1}}},
        {"model_args": {"class_token": 1}},
        {"model_args": {"global_pool": None}},
        {"pretrained_cfg": []},
        {"pretrained_cfg": {"input_size": 224}},
        {"pretrained_cfg": {"input_size": [3, 224]}},
        {"pretrained_cfg": {"input_size": ["3", 224, 224]}},
        {"pretrained_cfg": {"num_classes": "many"}},
    ],
    ids=str,
)
def test_a_config_of_another_shape_is_an_error_that_names_the_key(config):
    with pytest.raises(ConfigError, match=r"^config.json: (model_args|pretrained_cfg|in_chans|num_classes)"):
        model_keys({"architecture": "vit_base_patch16_224", **config})
