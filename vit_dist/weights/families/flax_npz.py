"""big_vision and vision_transformer: npz files of Flax's parameters, without a config.

The code of both is the same for all their models, so the file's names tell the rest: LayerNorm adds 1e-6, GELU is the
approximation by tanh, and big_vision computes the positions that are not in the file.
"""

import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.weights.description import Description
from vit_dist.weights.naming import Entry, Naming
from vit_dist.weights.origin import Origin
from vit_dist.weights.stored_tensor import StoredTensor

_EMBEDDING = "embedding/kernel"
_PREFIXES = ("", "params/", "params/img/", "img/", "opt/target/")
# Where learned positions are; only the first is in files of today's code.
_POSITIONS = ("pos_embedding", "Transformer/pos_embedding", "Transformer/posembed_input/pos_embedding")
# Of a checkpoint of training, whose parameters are under `params/` or, as Flax's old optimizers have it, `opt/target/`:
# moments and counts of the optimizer, clocks. Of a model of images and texts: the other tower, and what compares both.
_LEFT_OUT = {
    "params/": ("opt/", "chrono/"),
    "params/img/": ("params/txt/", "params/t$", "params/b$", "opt/", "chrono/"),
    "img/": ("txt/", "t$", "b$"),
    "opt/target/": ("opt/state/",),
}


def recognises(origin: Origin) -> bool:
    """Returns whether the names are those of big_vision or vision_transformer."""
    return any(f"{prefix}{_EMBEDDING}" in origin.tensors for prefix in _PREFIXES)


def describe(origin: Origin) -> Description:
    """Returns the model that the tensors make; raises `ConfigError` where they do not tell."""
    tensors = origin.tensors
    prefix = next(prefix for prefix in _PREFIXES if f"{prefix}{_EMBEDDING}" in tensors)
    first = next((name for name in tensors if name.startswith(f"{prefix}Transformer/encoderblock")), "")
    stacked = first.startswith(f"{prefix}Transformer/encoderblock/")
    block = f"{prefix}Transformer/encoderblock" if stacked else f"{prefix}Transformer/encoderblock_#"
    old = any("MultiHeadDotProductAttention_1" in name for name in tensors)  # vision_transformer counts on
    attention = f"{block}/MultiHeadDotProductAttention_{int(old)}"
    norm2, mlp = (
        (f"{block}/LayerNorm_2", f"{block}/MlpBlock_3") if old else (f"{block}/LayerNorm_1", f"{block}/MlpBlock_0")
    )
    pool = f"{prefix}MAPHead_0"
    position = next((f"{prefix}{name}" for name in _POSITIONS if f"{prefix}{name}" in tensors), None)
    if position is None and old:
        raise ConfigError(f"init.weights: tensor {prefix}{_POSITIONS[-1]} is missing; fetch the file again")
    table: dict[str, Entry] = {
        "patch": f"{prefix}embedding/{{}}",
        "norm": f"{prefix}Transformer/encoder_norm/{{}}",
        "norm1": f"{block}/LayerNorm_0/{{}}",
        "norm2": f"{norm2}/{{}}",
        "attention/qkv": tuple(f"{attention}/{name}/{{}}" for name in ("query", "key", "value")),
        "attention/projection": f"{attention}/out/{{}}",
        "mlp/up": f"{mlp}/Dense_0/{{}}",
        "mlp/down": f"{mlp}/Dense_1/{{}}",
        "pool/probe": f"{pool}/probe",
        "pool/query": f"{pool}/MultiHeadDotProductAttention_0/query/{{}}",
        "pool/key_value": tuple(f"{pool}/MultiHeadDotProductAttention_0/{name}/{{}}" for name in ("key", "value")),
        "pool/projection": f"{pool}/MultiHeadDotProductAttention_0/out/{{}}",
        "pool/norm": f"{pool}/LayerNorm_0/{{}}",
        "pool/mlp/up": f"{pool}/MlpBlock_0/Dense_0/{{}}",
        "pool/mlp/down": f"{pool}/MlpBlock_0/Dense_1/{{}}",
        "pre_logits": f"{prefix}pre_logits/{{}}",
        "head": f"{prefix}head/{{}}",
    }
    query, up = (f"{name.replace('#', '0')}/kernel" for name in (f"{attention}/query", f"{mlp}/Dense_0"))
    model = _model(tensors, prefix, query, up, stacked)
    model |= _positions(tensors, position, model)
    return Description(
        "vision_transformer" if old else "big_vision",
        model,
        Naming(table, manner="flax", left_out=_LEFT_OUT.get(prefix, ()), stacked=stacked),
        functools.partial(_preprocessing, str(origin.files[0]), position is not None),
        position=position,
        cls=f"{prefix}cls" if model["class_token"] else None,
    )


def _model(tensors: Mapping[str, StoredTensor], prefix: str, query: str, up: str, stacked: bool) -> dict[str, Any]:
    """Returns the keys that shapes and names tell; `query`, `up`: the names of two kernels of the first block."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        found = tensors[name].shape if name in tensors else None
        if found is None or len(found) != axes:
            state = "is missing" if found is None else f"has the shape {list(found)}, expected {axes} axes"
            raise ConfigError(f"init.weights: tensor {name} {state}; it tells the model's size; fetch the file again")
        return found

    kernel, head = shape(f"{prefix}{_EMBEDDING}", 4), f"{prefix}head/kernel"
    queries, hidden = shape(query, 3 + stacked), shape(up, 2 + stacked)
    names = {name[len(prefix) :] for name in tensors if name.startswith(prefix)}
    blocks = {name.split("/")[1] for name in names if name.startswith("Transformer/encoderblock_")}
    pool = "map" if any(name.startswith("MAPHead_0/") for name in names) else "cls" if "cls" in names else "mean"
    return {
        "width": kernel[3],
        "depth": queries[0] if stacked else len(blocks),
        "heads": queries[-2],
        "mlp": hidden[-1],
        "patch_size": kernel[:2],
        "channels": kernel[2],
        "norm_epsilon": 1e-6,
        "activation": "gelu_tanh",
        "pool": pool,
        "class_token": "cls" in names,
        "pre_logits": shape(f"{prefix}pre_logits/kernel", 2)[1] if "pre_logits/kernel" in names else None,
        "num_classes": shape(head, 2)[1] if head in tensors else 0,
    }


def _positions(tensors: Mapping[str, StoredTensor], position: str | None, model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of positions, and of the image's size, which is square if their number is."""
    high, wide = model["patch_size"]
    if position is None:  # big_vision computes them for an image of any size, on which no parameter depends
        return {"position": "sincos2d", "cls_position": False, "image_size": (14 * high, 14 * wide)}
    count = tensors[position].shape[-2]
    own = model["class_token"] and math.isqrt(count) ** 2 != count  # older code added them after the class token
    side = math.isqrt(count - own)
    if side**2 != count - own:
        raise ConfigError(f"init.weights: tensor {position} has {count} positions, which are of no square image")
    return {"position": "learned", "cls_position": bool(own), "image_size": (side * high, side * wide)}


def _preprocessing(source: str, has_size: bool, given: Collection[str]) -> dict[str, Any]:
    """Returns what both train and evaluate with: pixels from -1 to 1, the image resized to a square without a crop."""
    if not has_size and "model.image_size" not in given:
        raise ConfigError(f"{source}: does not say the size of its images; set model.image_size")
    keys = {"data.mean": 0.5, "data.std": 0.5, "data.interpolation": "bilinear", "data.eval_crop": None}
    return {key: value for key, value in keys.items() if key not in given}
