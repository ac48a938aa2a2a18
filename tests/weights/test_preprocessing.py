"""What the files of timm, OpenCLIP and transformers say of preprocessing, and the pixels that they make of pictures.

`benchmarks/peers/preprocessing_fixtures.py` writes their pixels.
"""

import base64
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vit_dist import config
from vit_dist.config import pair
from vit_dist.data.stream.pixels import evaluation_image
from vit_dist.schema import ConfigError
from vit_dist.weights.preprocessing import from_open_clip, from_timm, from_transformers

CASES = json.loads(Path(__file__).with_name("preprocessing.json").read_text())["cases"]
CASE = {case["name"]: case for case in CASES}
TIMM, OPEN_CLIP = CASE["timm center"]["config"], CASE["open_clip shortest"]["config"]
PROCESSORS = {name.split()[1]: case["config"] for name, case in CASE.items() if name.startswith("transformers")}
# EXIF's orientation -> how an upright image is stored.
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def picture(height: int, width: int) -> Image.Image:
    """As in the script that makes the fixtures."""
    blocks = np.random.RandomState(height).choice(np.array([0, 3, 90, 200, 255], np.uint8), (height, width, 3))
    return Image.fromarray(blocks.repeat(5, axis=0).repeat(3, axis=1)[:height, :width])


def png(image: Image.Image, orientation: int = 1) -> bytes:
    stored = STORED_AS[orientation]
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    (image if stored is None else image.transpose(stored)).save(file, "PNG", exif=exif)
    return file.getvalue()


def keys_of(case: dict[str, Any]) -> dict[str, Any]:
    if case["name"].startswith("timm"):
        return from_timm(case["config"], "config.json")
    if case["name"].startswith("open_clip"):
        return from_open_clip(case["config"], case["config"]["size"], "open_clip_config.json")
    return from_transformers(case["config"], "preprocessor_config.json")


def resolved(keys: dict[str, Any]) -> config.Config:
    values: dict[str, Any] = {"total_steps": 1, "model": {}, "data": {}}
    for key, value in keys.items():
        room, name = key.split(".")
        values[room][name] = value
    return config.resolve(values)


def pixels_of(result: dict[str, Any]) -> np.ndarray:
    """The peer's pixels in grey levels."""
    whole = result["steps"] == 1
    stored = np.frombuffer(zlib.decompress(base64.b64decode(result["pixels"])), "u1" if whole else "<u2")
    return stored.reshape(result["shape"]) / result["steps"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_pixels_are_those_of_the_peer_within_a_grey_level(case: dict[str, Any]) -> None:
    settings = resolved(keys_of(case))
    for result in case["results"]:
        own = evaluation_image(png(picture(*result["picture"])), settings.data, pair(settings.model.image_size), 3)
        assert list(own.shape) == result["shape"]
        assert np.abs(own - pixels_of(result)).max() <= 1, result["picture"]


@pytest.mark.parametrize("orientation", STORED_AS)
def test_an_image_stored_in_any_orientation_has_the_same_pixels(orientation: int) -> None:
    for name in ("timm center oblong", "timm border cut", "transformers DINOv2"):
        settings = resolved(keys_of(CASE[name]))
        for result in CASE[name]["results"]:
            stored = png(picture(*result["picture"]), orientation)
            own = evaluation_image(stored, settings.data, pair(settings.model.image_size), 3)
            assert np.abs(own - pixels_of(result)).max() <= 1, (name, result["picture"])


def test_timms_config_becomes_keys() -> None:
    assert keys_of(CASE["timm center"]) == {
        "model.image_size": 12,
        "model.channels": 3,
        "data.mean": (0.485, 0.456, 0.406),
        "data.std": (0.229, 0.224, 0.225),
        "data.interpolation": "bicubic",
        "data.eval_crop_mode": "center",
        "data.eval_crop": 0.75,
        "data.eval_rounding": "timm",
    }
    assert keys_of(CASE["timm center oblong"])["model.image_size"] == (12, 8)


@pytest.mark.parametrize(
    ("name", "changed", "size", "mode", "resized"),
    [
        ("ViT", {}, 12, "squash", 12),
        ("ViT", {"size": 224}, 224, "squash", 224),
        ("SigLIP", {"size": {"height": 20, "width": 30}}, (20, 30), "squash", 20),
        ("DINOv3", {}, 12, "squash", 12),
        ("DeiT", {"size": 256, "crop_size": 224}, 224, "squash", 256),
        ("CLIP", {"size": 224, "crop_size": 224}, 224, "center", 224),
        ("CLIP", {"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"}, 12, "center", 12),
        ("CLIP", {"image_processor_type": "CLIPImageProcessorFast"}, 12, "center", 12),
        ("DINOv2", {"size": {"shortest_edge": 241}, "crop_size": {"height": 200, "width": 200}}, 200, "center", 241),
    ],
)
def test_a_processors_config_becomes_keys(
    name: str, changed: dict[str, Any], size: Any, mode: str, resized: int
) -> None:
    keys = from_transformers(PROCESSORS[name] | changed, "preprocessor_config.json")
    assert (keys["model.image_size"], keys["data.eval_crop_mode"]) == (size, mode)
    assert int((size if isinstance(size, int) else size[0]) / keys["data.eval_crop"]) == resized
    assert keys["data.interpolation"] == {2: "bilinear", 3: "bicubic"}[PROCESSORS[name]["resample"]]
    assert keys["data.eval_rounding"] == "transformers"
    assert list(keys["data.mean"]) == PROCESSORS[name]["image_mean"]
    assert from_transformers({"image_processor": PROCESSORS[name] | changed}, "processor_config.json") == keys


def test_pixels_that_are_not_normalised_have_mean_0_and_std_1() -> None:
    keys = from_transformers(PROCESSORS["ViT"] | {"do_normalize": False}, "preprocessor_config.json")
    assert (keys["data.mean"], keys["data.std"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("input_size", "model.image_size"),
        ("mean", "data.mean"),
        ("std", "data.std"),
        ("interpolation", "data.interpolation"),
        ("crop_mode", "data.eval_crop_mode"),
        ("crop_pct", "data.eval_crop"),
    ],
)
def test_what_timms_config_does_not_say_names_the_key_to_set(name: str, key: str) -> None:
    for silent in (TIMM | {name: None}, {one: value for one, value in TIMM.items() if one != name}):
        with pytest.raises(ConfigError, match=f"^file: does not say {name}; set {key}$"):
            from_timm(silent, "file")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"interpolation": "lanczos"}, "'lanczos', expected one of bilinear, bicubic; set data.interpolation"),
        ({"crop_mode": "random"}, "'random', expected one of center, squash, border; set data.eval_crop_mode"),
        ({"crop_pct": 1.15}, "crop_pct: must be above 0 and at most 1, found 1.15; set data.eval_crop"),
        ({"crop_pct": "0.9"}, "crop_pct: expected a number, found '0.9' .str.; set data.eval_crop"),
        ({"input_size": [224, 224]}, "input_size: expected .*; set model.image_size"),
        (
            {"input_size": [3, 0, 224]},
            "input_size.1.: must be above 0 and at most 65536, found 0; set model.image_size",
        ),
        ({"mean": {"r": 1}}, "mean: expected a number or a list of a number, .*; set data.mean"),
        ({"std": [0.5, 0, 0.5]}, "std.1.: must be above 0, found 0; set data.std"),
    ],
)
def test_what_we_cannot_do_of_timms_config_names_the_key_to_set(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^file: .*{message}$"):
        from_timm(TIMM | changed, "file")


def test_a_config_of_another_shape_is_an_error() -> None:
    for read in (from_timm, from_transformers):
        with pytest.raises(ConfigError, match="^file: expected names and values, found .1.$"):
            read([1], "file")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="^file: expected names and values, found 'ViT'$"):
        from_transformers({"image_processor": "ViT"}, "file")


WRONG = (
    *(
        True,
        0,
        -1,
        0.5,
        1e300,
        float("nan"),
        10**400,
        "",
        "x" * 5000,
        "a b " * 5000,
        "\n\033[2J",
        [],
        [[]],
        [1e300] * 3,
    ),
    *(["a"] * 3, {}, {"": 1}, {"height": 10**400, "width": 1}, {"height": 1, "width": 1}, {"shortest_edge": {}}),
)


def test_a_value_of_any_type_is_taken_or_is_an_error_of_one_short_line() -> None:
    readers = [(from_timm, TIMM), *((from_transformers, processor) for processor in PROCESSORS.values())]
    readers.append((lambda values, source: from_open_clip(values, 224, source), OPEN_CLIP))
    messages = []
    for read, stated in readers:
        for name in (*stated, "image_processor", "do_center_crop", "do_pad"):
            for value in WRONG:
                try:
                    read(stated | {name: value}, "file")
                except ConfigError as error:
                    messages.append(str(error))
    assert len(messages) > 1000
    assert all(message.isprintable() and len(message) < 400 for message in messages)


def test_what_we_cannot_do_of_open_clips_config_names_the_key_to_set() -> None:
    with pytest.raises(ConfigError, match="'longest', expected one of shortest, squash; set data.eval_crop_mode"):
        from_open_clip(OPEN_CLIP | {"resize_mode": "longest"}, 224, "file")  # it fills with black
    with pytest.raises(ConfigError, match="file: does not say interpolation; set data.interpolation"):
        from_open_clip({"mean": 0.5, "std": 0.5}, 224, "file")


@pytest.mark.parametrize(
    ("processor", "changed", "message"),
    [
        ("ViT", {"image_processor_type": None}, "does not say feature_extractor_type; set OF SIZE"),
        (
            "ViT",
            {"image_processor_type": "ConvNextImageProcessor"},
            "is 'ConvNextImageP.*, expected that of ViT, .*OF SIZE",
        ),
        ("ViT", {"do_resize": False}, "do_resize is False, expected true; set OF SIZE"),
        ("ViT", {"do_pad": True}, "do_pad is True, expected false; set OF SIZE"),
        ("ViT", {"size": None}, "does not say size; set OF SIZE"),
        ("ViT", {"size": "large"}, "size: expected a whole number, found 'large' .str.; set OF SIZE"),
        ("ViT", {"size": {"longest_edge": 9}}, "size is .*, expected shortest_edge, or height and width; set OF SIZE"),
        ("ViT", {"size": {"height": 9, "width": None}}, "expected shortest_edge, or height and width; set OF SIZE"),
        (
            "ViT",
            {"size": {"shortest_edge": 9}},
            "expected height and width, as there is no do_center_crop; set OF SIZE",
        ),
        ("CLIP", {"do_center_crop": None}, "does not say do_center_crop; set OF SIZE"),
        ("CLIP", {"crop_size": None}, "does not say crop_size; set OF SIZE"),
        (
            "CLIP",
            {"crop_size": {"height": 8, "width": 9}},
            "crop_size is .*, expected equal height and width; set OF SIZE",
        ),
        (
            "CLIP",
            {"crop_size": 13},
            "crop_size is 13, expected no more than, and of the shape of, size, .*; set OF SIZE",
        ),
        ("DeiT", {"size": {"height": 16, "width": 20}}, "of the shape of, size, which is .16, 20.; set OF SIZE"),
        ("ViT", {"do_rescale": False}, "do_rescale is False, expected true; set data.mean"),
        ("ViT", {"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078.*, expected 1/255; set data.mean"),
        ("ViT", {"do_normalize": "no"}, "do_normalize: expected true or false, found 'no' .*; set data.mean"),
        ("ViT", {"image_mean": None}, "does not say image_mean; set data.mean"),
        ("ViT", {"image_std": None}, "does not say image_std; set data.std"),
        ("ViT", {"resample": None}, "does not say resample; set data.interpolation"),
        ("ViT", {"resample": 1}, "resample is 1, expected one of 2, 3; set data.interpolation"),
    ],
)
def test_what_a_processor_does_not_say_or_we_cannot_do_names_the_key_to_set(
    processor: str, changed: dict[str, Any], message: str
) -> None:
    message = message.replace("OF SIZE", "model.image_size, data.eval_crop_mode, data.eval_crop")
    with pytest.raises(ConfigError, match=f"^file: .*{message}$"):
        from_transformers(PROCESSORS[processor] | changed, "file")


def test_a_key_that_the_user_has_set_is_not_read() -> None:
    given = ("data.interpolation", "data.eval_crop")
    keys = from_timm(TIMM | {"interpolation": "lanczos", "crop_pct": None}, "file", given=given)
    assert keys.keys() == from_timm(TIMM, "file").keys() - set(given)
    of_size = ("model.image_size", "data.eval_crop_mode", "data.eval_crop")
    unknown = PROCESSORS["ViT"] | {"image_processor_type": "ConvNextImageProcessor"}
    assert from_transformers(unknown, "file", given=of_size)["data.interpolation"] == "bilinear"
