"""Reads how a published model's images were prepared, as the keys that make `data/` prepare them so.

Three kinds of file say it: timm's `config.json` (`pretrained_cfg`), transformers' `preprocessor_config.json` and
OpenCLIP's `open_clip_config.json` (`preprocess_cfg`). Nothing is guessed: where a file does not say a value, or says
one that `data/` cannot do, the error names the key to set. A key that the user has set is not read.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

from vit_dist.config import Size
from vit_dist.schema import Bound, PositiveFloat, PositiveFraction, PositiveInt
from vit_dist.weights.said import Said

Side = Annotated[int, Bound("above 0 and at most 65536", lambda value: 0 < value <= 65_536)]  # pixels
Readers = dict[str, Callable[[], Any]]  # key -> what reads its value
_MEAN = float | tuple[float, ...]  # one number, or one for each channel
_STD = PositiveFloat | tuple[PositiveFloat, ...]

_INTERPOLATIONS = {"bilinear": "bilinear", "bicubic": "bicubic"}
_CROP_MODES = {"center": "center", "squash": "squash", "border": "border"}  # timm's
_RESIZE_MODES = {"shortest": "center", "squash": "squash"}  # OpenCLIP's; its `longest` fills with black
_RESAMPLES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
# transformers' processors with the steps of `_Steps` -> whether a size of one number is that of the short side.
_PROCESSORS = {"ViT": False, "DeiT": False, "DINOv3ViT": False, "Siglip": True, "CLIP": True, "Bit": True}
_CROP_IF_SILENT = ("DeiT", "CLIP", "Bit")
_LEVEL = 1 / 255  # of a pixel in [0, 1]


def from_timm(pretrained_cfg: Mapping[str, Any], source: str, given: Collection[str] = ()) -> dict[str, Any]:
    """Returns the keys that prepare images as timm's evaluation does.

    Args:
      pretrained_cfg: as in the `config.json` that timm writes.
      source: names it in errors.
      given: keys such as `data.mean` that the user has set: they are left out, and need not be in the file.

    Returns:
      Values by key, such as `{"data.mean": (0.5, 0.5, 0.5)}`.

    Raises:
      ConfigError: a value is missing, of the wrong type, or one that `data/` cannot do.
    """
    said = Said(pretrained_cfg, source)
    sizes = tuple[PositiveInt, Side, Side]  # channels, height, width
    readers: Readers = {
        "model.image_size": lambda: said.read("input_size", sizes, "model.image_size")[1:],
        "model.channels": lambda: said.read("input_size", sizes, "model.channels")[0],
        "data.mean": lambda: said.read("mean", _MEAN, "data.mean"),
        "data.std": lambda: said.read("std", _STD, "data.std"),
        "data.interpolation": lambda: said.choice("interpolation", _INTERPOLATIONS, "data.interpolation"),
        "data.eval_crop_mode": lambda: said.choice("crop_mode", _CROP_MODES, "data.eval_crop_mode"),
        "data.eval_crop": lambda: said.read("crop_pct", PositiveFraction, "data.eval_crop"),
        "data.eval_rounding": lambda: "timm",
    }
    return _read(readers, given)


def from_open_clip(
    preprocess_cfg: Mapping[str, Any], image_size: Size, source: str, given: Collection[str] = ()
) -> dict[str, Any]:
    """Returns the keys that prepare images as OpenCLIP does.

    Args:
      preprocess_cfg: as in `open_clip_config.json`.
      image_size: that of the file's `vision_cfg`.
      source: as in `from_timm`.
      given: as in `from_timm`.

    Returns:
      As `from_timm`.

    Raises:
      ConfigError: as `from_timm`.
    """
    said = Said(preprocess_cfg, source)
    readers: Readers = {
        "model.image_size": lambda: image_size,
        "model.channels": lambda: 3,
        "data.mean": lambda: said.read("mean", _MEAN, "data.mean"),
        "data.std": lambda: said.read("std", _STD, "data.std"),
        "data.interpolation": lambda: said.choice("interpolation", _INTERPOLATIONS, "data.interpolation"),
        "data.eval_crop_mode": lambda: said.choice("resize_mode", _RESIZE_MODES, "data.eval_crop_mode"),
        "data.eval_crop": lambda: 1.0,
        "data.eval_rounding": lambda: "timm",
    }
    return _read(readers, given)


def from_transformers(config: Mapping[str, Any], source: str, given: Collection[str] = ()) -> dict[str, Any]:
    """Returns the keys that prepare images as one of transformers' processors does.

    Args:
      config: as in `preprocessor_config.json`, or in `processor_config.json`, which has it under `image_processor`.
      source: as in `from_timm`.
      given: as in `from_timm`.

    Returns:
      As `from_timm`, without `model.channels`, which the model's own config says.

    Raises:
      ConfigError: as `from_timm`.
    """
    said = Said(config, source)
    if said.values.get("image_processor") is not None:
        said = Said(said.values["image_processor"], source)
    of_size = ", ".join(
        key for key in ("model.image_size", "data.eval_crop_mode", "data.eval_crop") if key not in given
    )
    readers: Readers = {
        "model.image_size": lambda: _steps(said, of_size).image_size,
        "data.mean": lambda: said.read("image_mean", _MEAN, "data.mean") if _normalizes(said, "data.mean") else 0.0,
        "data.std": lambda: said.read("image_std", _STD, "data.std") if _normalizes(said, "data.std") else 1.0,
        "data.interpolation": lambda: said.choice("resample", _RESAMPLES, "data.interpolation"),
        "data.eval_crop_mode": lambda: _steps(said, of_size).crop_mode,
        "data.eval_crop": lambda: _steps(said, of_size).crop,
        "data.eval_rounding": lambda: "transformers",
    }
    return _read(readers, given)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """What a processor of transformers does with the size of an image."""

    image_size: Size
    crop_mode: str
    crop: float


def _read(readers: Readers, given: Collection[str]) -> dict[str, Any]:
    """Returns the values of all keys that are not given; a pair of equal sizes as one number."""
    values = {key: read() for key, read in readers.items() if key not in given}
    size = values.get("model.image_size")
    if isinstance(size, tuple) and size[0] == size[1]:
        values["model.image_size"] = size[0]
    return values


def _normalizes(said: Said, key: str) -> bool:
    """Returns whether pixels are normalised; raises where they are not in [0, 1] before."""
    if not said.flag("do_rescale", True, key):
        raise said.refusal("do_rescale", "true", key)
    factor = _LEVEL if said.values.get("rescale_factor") is None else said.read("rescale_factor", float, key)
    if not math.isclose(factor, _LEVEL, rel_tol=1e-3):
        raise said.refusal("rescale_factor", "1/255", key)
    return said.flag("do_normalize", True, key)


def _steps(said: Said, key: str) -> _Steps:
    """Returns what is done with the size; errors name `key`, or several."""
    name = "image_processor_type" if said.values.get("image_processor_type") else "feature_extractor_type"
    kind = (
        said.read(name, str, key).removesuffix("Fast").removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    )
    if kind not in _PROCESSORS:
        raise said.refusal(name, "that of " + ", ".join(_PROCESSORS), key)
    for flag, needed in (("do_resize", True), ("do_pad", False)):
        if said.flag(flag, needed, key) != needed:
            raise said.refusal(flag, str(needed).lower(), key)
    size = _size(said, "size", key, one_number="shortest_edge" if _PROCESSORS[kind] else "sides")
    if kind in _CROP_IF_SILENT:
        said.stated("do_center_crop", key)
    if not said.flag("do_center_crop", False, key):
        if isinstance(size, int):
            raise said.refusal("size", "height and width, as there is no do_center_crop", key)
        return _Steps(size, "squash", 1.0)
    crop = _size(said, "crop_size", key, one_number="sides")
    if isinstance(crop, int) or (isinstance(size, int) and crop[0] != crop[1]):
        raise said.refusal("crop_size", "equal height and width", key)
    resized = (size, size) if isinstance(size, int) else size
    ratio = _ratio(crop[0], resized[0])
    if ratio > 1 or tuple(math.floor(side / ratio) for side in crop) != resized:
        raise said.refusal("crop_size", f"no more than, and of the shape of, size, which is {resized}", key)
    return _Steps(crop, "center" if isinstance(size, int) else "squash", ratio)


def _size(said: Said, name: str, key: str, one_number: str) -> int | tuple[int, int]:
    """Returns the short side, or (height, width); `one_number` says which of them a size of one number is."""
    size = said.stated(name, key)
    if not isinstance(size, Mapping):
        side = said.read(name, Side, key)
        return side if one_number == "shortest_edge" else (side, side)
    stated = {side: value for side, value in size.items() if value is not None}
    sides = Said(stated, f"{said.source}: {name}")
    if stated.keys() == {"shortest_edge"}:
        return sides.read("shortest_edge", Side, key)
    if stated.keys() == {"height", "width"}:
        return sides.read("height", Side, key), sides.read("width", Side, key)
    raise said.refusal(name, "shortest_edge, or height and width", key)


def _ratio(crop: int, resized: int) -> float:
    """Returns `data.eval_crop`, with which `crop` / it, rounded down, is `resized`."""
    ratio = crop / resized
    return ratio if math.floor(crop / ratio) == resized else crop / (resized + 0.5)
