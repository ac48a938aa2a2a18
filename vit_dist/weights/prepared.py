"""How our images are prepared, as the configs of timm and transformers say it: the way back of `preprocessing`.

Our own evaluation with a crop ("fast": cut, then resize) is written as theirs (resize, then cut) of the same part of
the image. Sides and offsets are rounded elsewhere: on three photos at 224 pixels, levels differ by 4 of 255 on average.
"""

import math
from typing import Any

from vit_dist.config import ConfigError, Data, pair
from vit_dist.weights.description import Subject

_RESAMPLES = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def timm_cfg(subject: Subject) -> dict[str, Any]:
    """Returns timm's `pretrained_cfg` of a model, without the number of classes."""
    data, channels = subject.data, subject.model.channels
    known = {} if subject.license is None else {"license": subject.license}
    mode, share = _crop(data)
    return {
        "custom_load": False,
        "input_size": [channels, *pair(subject.model.image_size)],
        "fixed_input_size": True,
        "interpolation": data.interpolation,
        "crop_pct": share,
        "crop_mode": mode,
        "mean": _per_channel(data.mean, channels),
        "std": _per_channel(data.std, channels),
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **known,
    }


def processor_config(subject: Subject) -> dict[str, Any]:
    """Returns transformers' preprocessor_config.json; raises `ConfigError` for a crop that its processors have not."""
    data, channels = subject.data, subject.model.channels
    height, width = pair(subject.model.image_size)
    mode, share = _crop(data)
    if mode == "border":
        raise ConfigError("data.eval_crop_mode: border, which no processor of transformers does; export --format=timm")
    size = {"height": math.floor(height / share), "width": math.floor(width / share)}
    values: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": size}
    if share < 1 or mode == "center":
        if height != width:
            raise ConfigError(
                f"data.eval_crop_mode: {data.eval_crop_mode}, of which transformers' processors cut squares alone, but "
                f"model.image_size is {height}x{width}; export --format=timm"
            )
        if mode == "center":
            values["size"] = {"shortest_edge": size["height"]}
        crop = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
        values |= {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": channels == 3, **crop}
    return values | {
        "resample": _RESAMPLES[data.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _per_channel(data.mean, channels),
        "image_std": _per_channel(data.std, channels),
    }


def _crop(data: Data) -> tuple[str, float]:
    """Returns timm's crop_mode and crop_pct."""
    if data.eval_crop_mode == "fast":
        return ("squash", 1.0) if data.eval_crop is None else ("center", data.eval_crop)
    return data.eval_crop_mode, data.eval_crop or 1.0


def _per_channel(value: Any, channels: int) -> list[float]:
    return [float(value)] * channels if isinstance(value, int | float) else [float(one) for one in value]
