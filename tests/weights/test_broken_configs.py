"""Whatever stands in a config of published weights, it is understood, or one line says what is wrong with it."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import golden_weights
import pytest
from peak import PEAK_BYTES

from vit_dist.config import ConfigError
from vit_dist.weights import published, timm_architectures
from vit_dist.weights.config_defaults import config_defaults
from vit_dist.weights.origin import Origin, open_origin
from vit_dist.weights.published import understood

SLOW = ["timm_dinov3", "hf_dinov2_giant", "hf_dinov3", "hf_clip_full", "open_clip_gelu"]
NAMES = ["timm_vit_cls", "hf_vit", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
REMOVED = object()
VALUES = [
    REMOVED, None, True, 0, -1, 7, 10**9, 10**30, 0.5, 1e300, math.nan, "", "gelu", "\x1b[31m\nx" * 300, [], [64], [[]],
    {}, {"a": {"b": [1]}},
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def shapes_are_traced_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "shapes_of", functools.cache(published.shapes_of))
        yield


def opened(name: str, folder: Path) -> tuple[Origin, str]:
    """The files of a golden fixture, and the name of that with the config."""
    fixture = golden_weights.fixture(name)
    golden_weights.write(fixture, folder)
    return open_origin(folder), fixture["config_file"]


def error(origin: Origin, file: str, config: Any) -> str:
    """The one line that says what is wrong with a config; "" where there is nothing."""
    try:
        found = understood(dataclasses.replace(origin, configs={**origin.configs, file: config}))
        found.description.preprocessing(())
    except ConfigError as raised:
        line = str(raised)
        assert line.isprintable() and len(line) < 700, line
        return line
    return ""


def keys(config: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*above, key)
        if isinstance(value, dict) and key not in ("id2label", "label2id", "text_config"):
            yield from keys(value, (*above, key))


def changed(config: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The config with another value at a path."""
    result = dict(config)
    if len(path) > 1:
        result[path[0]] = changed(config[path[0]], path[1:], value)
    elif value is REMOVED:
        result.pop(path[0], None)
    else:
        result[path[0]] = value
    return result


def silent_keys(name: str) -> list[tuple[str, ...]]:
    """Keys that the library of a fixture knows and its config need not have."""
    if name.startswith("timm"):
        return [("model_args", key) for known in timm_architectures.table()["defaults"].values() for key in known]
    if name.startswith("open_clip"):
        return [("model_cfg", "vision_cfg", key) for key in config_defaults("open_clip")]
    return []


@pytest.mark.parametrize("name", NAMES)
def test_any_value_of_any_key_is_understood_or_named(name: str, tmp_path: Path) -> None:
    origin, file = opened(name, tmp_path)
    config = origin.configs[file]
    for path in dict.fromkeys([*keys(config), *silent_keys(name)]):
        for value in VALUES:
            line = error(origin, file, changed(config, path, value))
            # A number of another model, which its tensors are not, is told by them; a whole part that is missing, by
            # what it should say.
            words = (path[-1], "tensor", "preprocessor_config.json", "as the MLP is gated", "does not say")
            assert not line or line.startswith(str(tmp_path)), (path, value, line)
            assert not line or any(word in line for word in words), (path, value, line)


@pytest.mark.parametrize("value", [None, True, 3, "x", [], [1]])
def test_a_config_that_is_no_object_is_named(value: Any, tmp_path: Path) -> None:
    for name in ("timm_vit_cls", "hf_vit", "open_clip_gelu"):
        fixture = golden_weights.fixture(name)
        golden_weights.write(fixture, tmp_path / name)
        (tmp_path / name / fixture["config_file"]).write_text(json.dumps(value))
        with pytest.raises(ConfigError, match=f"{fixture['config_file']}: expected a JSON object, found"):
            open_origin(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        ("timm_vit_cls", ("model_args", "num_heads"), 5, "model.width: 64 does not divide by 5 heads"),
        ("timm_vit_cls", ("model_args", "patch_size"), 96, "image_size: height 48 is not a multiple of the patch's 96"),
        ("timm_vit_cls", ("model_args", "depth"), 10**9, "model.depth: must be at most 1,000, found 1000000000"),
        ("timm_vit_cls", ("model_args", "depth"), 4, r"tensor blocks\.3\.\S+ is missing"),
        ("timm_vit_cls", ("model_args", "depth"), 2, "no place for tensor blocks.2.attn"),
        ("timm_vit_cls", ("model_args", "mlp_ratio"), 1e300, "model.mlp: must be at most 1,048,576, found 6400000"),
        ("hf_vit", ("num_attention_heads",), 5, "model.width: 64 does not divide by 5 heads"),
        ("hf_vit", ("num_hidden_layers",), 10**9, "model.depth: must be at most 1,000, found 1000000000"),
        ("hf_vit", ("hidden_act",), "relu", "hidden_act is 'relu', expected one of gelu, .*; set model.activation"),
        ("hf_vit", ("layer_norm_eps",), "small", "layer_norm_eps: expected a number, .*; set model.norm_epsilon"),
        ("hf_vit", ("model_type",), "swin", "model_type: 'swin' is none of vit, deit"),
        ("hf_vit", ("id2label",), {str(i): "x" for i in range(11)}, "tensor classifier.bias .*, expected .11."),
        ("hf_dinov2_giant", ("mlp_ratio",), 1e300, "model.mlp: must be at most 1,048,576, found 4266666"),
        ("hf_clip_full", ("projection_dim",), 25, "tensor visual_projection.weight .* expected .25, 64."),
        ("open_clip_gelu", ("model_cfg", "vision_cfg", "attentional_pool"), True, "attentional_pool is True, expected"),
        ("open_clip_gelu", ("model_cfg", "embed_dim"), 25, "tensor visual.proj .* expected .64, 25."),
    ],
)  # fmt: skip
def test_what_no_model_of_ours_is_says_why(
    name: str, path: tuple[str, ...], value: Any, words: str, tmp_path: Path
) -> None:
    origin, file = opened(name, tmp_path)
    with pytest.raises(ConfigError, match=words):
        understood(dataclasses.replace(origin, configs={file: changed(origin.configs[file], path, value)}))


def test_labels_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    origin, file = opened("hf_vit", tmp_path)

    def classes(labels: Any) -> Any:
        config = {**origin.configs[file], "id2label": labels}
        return understood(dataclasses.replace(origin, configs={file: config})).description.classes

    assert classes({str(i): f"c{i}" for i in reversed(range(10))}) == tuple(f"c{i}" for i in range(10))
    for wrong in ({str(i): "x" for i in range(1, 11)}, {"a": "b"}, [], {}, None):
        assert classes(wrong) is None


def test_wrong_configs_take_little_memory(tmp_path: Path) -> None:
    cases = [
        ("timm_vit_cls", ("model_args", key), value)
        for key, values in {
            "depth": [10**9, 999], "embed_dim": [2**40], "num_classes": [2**40], "img_size": [2**40],
            "patch_size": [2**30], "mlp_ratio": [1e300], "reg_tokens": [2**40], "in_chans": [2**40],
        }.items()
        for value in values
    ]  # fmt: skip
    cases += [("hf_vit", ("id2label",), {str(i): "x" for i in range(count)}) for count in (90_000, 200_000, 10**6)]
    for number, (name, path, value) in enumerate(cases):
        file = golden_weights.write(golden_weights.fixture(name), tmp_path / str(number))
        config = json.loads((file.parent / "config.json").read_text())
        (file.parent / "config.json").write_text(json.dumps(changed(config, path, value)))
    (tmp_path / "whole").mkdir()
    golden_weights.write(golden_weights.fixture("timm_vit_cls"), tmp_path / "whole")
    code = f"""
from vit_dist.config import ConfigError
from vit_dist.weights.published import open_published
{PEAK_BYTES}
open_published("whole")
before = peak_bytes()
for number in range({len(cases)}):
    try:
        open_published(str(number))
        print("loaded", number)
    except ConfigError as error:
        print(peak_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    grown = list(map(int, done.stdout.split()))
    assert len(grown) == len(cases) and grown[-1] < 30e6, grown
