"""DINOv3 under Meta's own names, which come without a config.

The code is the same for all its models, so the file's names tell the rest: norms add 1e-5, GELU is exact, and positions
are rotated with base 100. What prepares images differs from one data set to another, and is not told.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.weights.description import Description
from vit_dist.weights.naming import Entry, Naming, Part
from vit_dist.weights.origin import Origin
from vit_dist.weights.preprocessing import from_timm
from vit_dist.weights.stored_tensor import StoredTensor

_REGISTERS, _PERIODS, _PATCH = "storage_tokens", "rope_embed.periods", "patch_embed.proj.weight"
_BASE = 100.0
# What masks patches and normalises crops in training, the mask that makes the bias of keys zero, and the periods.
_LEFT_OUT = ("mask_token$", "local_cls_norm\\.", "blocks\\.\\d+\\.attn\\.qkv\\.bias_mask$", "rope_embed\\.periods$")


def recognises(origin: Origin) -> bool:
    """Returns whether the names are Meta's."""
    return _REGISTERS in origin.tensors and origin.config is None


def describe(origin: Origin) -> Description:
    """Returns the model that the tensors make; raises `ConfigError` where they do not tell."""
    tensors = origin.tensors
    qkv = tuple(Part("blocks.#.attn.qkv.{}", i, i + 1, 3) for i in range(3))
    gated = "blocks.0.mlp.w1.weight" in tensors
    gate, up, down = ("w1", "w2", "w3") if gated else ("", "fc1", "fc2")
    table: dict[str, Entry] = {
        "patch": "patch_embed.proj.{}",
        "norm": "norm.{}",
        "norm1": "blocks.#.norm1.{}",
        "norm2": "blocks.#.norm2.{}",
        "attention/qkv": qkv,
        "attention/qkv/bias": (qkv[0], None, qkv[2]),
        "attention/projection": "blocks.#.attn.proj.{}",
        "mlp/gate": f"blocks.#.mlp.{gate}.{{}}",
        "mlp/up": f"blocks.#.mlp.{up}.{{}}",
        "mlp/down": f"blocks.#.mlp.{down}.{{}}",
        "scale1": "blocks.#.ls1.gamma",
        "scale2": "blocks.#.ls2.gamma",
    }
    return Description(
        "DINOv3",
        _model(tensors, f"blocks.0.mlp.{up}.weight", gated),
        Naming(table, left_out=_LEFT_OUT),
        functools.partial(_preprocessing, str(origin.files[0])),
        cls="cls_token",
        registers=(_REGISTERS,),
    )


def _model(tensors: Mapping[str, StoredTensor], up: str, gated: bool) -> dict[str, Any]:
    """Returns the keys that names and shapes tell; `up`: the name of a kernel of the first block."""
    for name, axes in ((_PATCH, 4), (up, 2), (_REGISTERS, 3), (_PERIODS, 1)):
        found = tensors[name].shape if name in tensors else None
        if found is None or len(found) != axes:
            state = "is missing" if found is None else f"has the shape {list(found)}, expected {axes} axes"
            raise ConfigError(f"init.weights: tensor {name} {state}; it tells the model's size; fetch the file again")
    width, channels, *patch = tensors[_PATCH].shape
    count = tensors[_PERIODS].shape[0]  # a quarter of a head's width: for rows and columns, of sines and cosines
    if not count or width % (4 * count):
        raise ConfigError(
            f"init.weights: tensor {_PERIODS} has {count} periods, which are of no heads of a width of {width}; fetch "
            "the file again"
        )
    # They may have been rounded to bfloat16.
    if not np.allclose(tensors[_PERIODS].read().astype(np.float32), _BASE ** (np.arange(count) / count), rtol=0.01):
        raise ConfigError(
            f"init.weights: tensor {_PERIODS} holds other periods than those of base {_BASE:.0f}, which are read"
        )
    return {
        "width": width,
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "heads": width // (4 * count),
        "mlp": tensors[up].shape[0],
        # The weights are for images of every size: with rotated positions no parameter depends on it.
        "image_size": (14 * patch[0], 14 * patch[1]),
        "patch_size": tuple(patch),
        "channels": channels,
        "norm_epsilon": 1e-5,
        "activation": "swiglu" if gated else "gelu",
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "layer_scale": 1.0,
        "position": "rope2d",
        "rope_base": _BASE,
        "cls_position": False,
        "registers": tensors[_REGISTERS].shape[1],
        "class_token": True,
        "pool": "cls",
        "num_classes": 0,
    }


def _preprocessing(source: str, given: Collection[str]) -> dict[str, Any]:
    """Returns nothing but how sizes are rounded, if all else is given; else raises, as nothing says it."""
    return from_timm({}, source, {*given, "model.channels"})
