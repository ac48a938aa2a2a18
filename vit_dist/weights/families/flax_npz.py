"""big_vision and vision_transformer: npz files of Flax's parameters, without a config.

The code of both is the same for all their models, so the file's names tell the rest: LayerNorm adds 1e-6, GELU is the
approximation by tanh, and big_vision computes the positions that are not in the file.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.model.shape import shape_of
from vit_dist.weights.description import Description, Draft, Subject
from vit_dist.weights.naming import Entry, Naming
from vit_dist.weights.origin import Origin
from vit_dist.weights.stored_tensor import StoredTensor, stubs
from vit_dist.weights.traits import full_traits_of

# What stands before the names: of a model, of a checkpoint of training, of a model of images and texts.
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
    return _prefix(origin.tensors) is not None


def describe(origin: Origin) -> Description:
    """Returns the model that the tensors make; raises `ConfigError` where they do not tell."""
    tensors, prefix = origin.tensors, _prefix(origin.tensors)
    assert prefix is not None
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
        name = f"{prefix}{_POSITIONS[-1]}"
        raise ConfigError(f"{origin.files[0]}: tensor {name} is missing, of which position is made; fetch it again")
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
    size = _Sizes(tensors, origin.files[0])
    model = _model(size, prefix, query, up, stacked)
    model |= _positions(size, position, model)
    return Description(
        "vision_transformer" if old else "big_vision",
        model,
        Naming(table, "flax", _LEFT_OUT.get(prefix, ()), stacked=stacked, sizes_from=tuple(size.asked)),
        functools.partial(_preprocessing, str(origin.files[0]), position is not None),
        position=position,
        cls=f"{prefix}cls" if model["class_token"] else None,
    )


def draft(subject: Subject) -> Draft:
    """Returns the files of a model: of vision_transformer where the class token has a position, else of big_vision."""
    traits = full_traits_of(subject.model)
    old = bool(traits["class_token"] and traits["cls_position"] and traits["position"] == "learned")
    prefix, block = ("" if old else "params/"), "Transformer/encoderblock"
    width, depth, heads, mlp = (traits[key] for key in ("width", "depth", "heads", "mlp"))
    high, wide = shape_of(subject.model).grid
    if high != wide and traits["position"] == "learned":
        raise ConfigError(
            f"model.image_size: {high}x{wide} patches, but big_vision's and vision_transformer's files do not say "
            "their shape and are read as a square; export --format=safetensors"
        )
    positions = high * wide + old
    # Those that tell the model's size; the rest follows from their names.
    shapes: dict[str, tuple[int, ...]] = {"embedding/kernel": (*traits["patch_size"], traits["channels"], width)}
    for number in range(depth):
        query = f"{block}_{number}/MultiHeadDotProductAttention_{int(old)}/query/kernel"
        shapes[query] = (width, heads, width // heads)
    shapes[f"{block}_0/MlpBlock_{3 if old else 0}/Dense_0/kernel"] = (width, mlp)
    if traits["position"] == "learned":
        shapes[_POSITIONS[-1] if old else _POSITIONS[0]] = (1, positions, width)
    shapes |= {"cls": (1, 1, width)} if traits["class_token"] else {}
    shapes |= {"MAPHead_0/probe": (1, 1, width)} if traits["pool"] == "map" else {}
    layer = traits["pre_logits"]
    shapes |= {"pre_logits/kernel": (width, layer)} if layer else {}
    shapes |= {"head/kernel": (layer or width, traits["num_classes"])} if traits["num_classes"] else {}
    file = "model.npz"
    origin = Origin(stubs({f"{prefix}{name}": shape for name, shape in shapes.items()}), {}, (Path(file),))
    described = describe(origin)
    if traits["position"] != "learned":  # the file then says nothing of the image's size
        described = dataclasses.replace(described, model={**described.model, "image_size": traits["image_size"]})
    return Draft(described, {}, file, before=int(old))


def _prefix(tensors: Mapping[str, StoredTensor]) -> str | None:
    """Returns what stands before the names of the tower that sees; None if the file is not of this family."""
    starts = ("Transformer/encoder", "embedding/kernel")
    return next((one for one in _PREFIXES if any(n.startswith(tuple(one + s for s in starts)) for n in tensors)), None)


class _Sizes:
    """The shapes of tensors that tell a model's sizes; `asked` are their names so far."""

    def __init__(self, tensors: Mapping[str, StoredTensor], file: Path):
        self.tensors, self.file = tensors, file
        self.asked: list[str] = []

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """Returns the shape of a tensor; raises `ConfigError` if it is missing, empty or has not as many axes."""
        found = self.tensors[name].shape if name in self.tensors else None
        if found is None or len(found) != axes or 0 in found:
            state = "is missing" if found is None else f"has the shape {list(found)}, expected {axes} axes"
            raise ConfigError(f"{self.file}: tensor {name} {state}; it tells the model's size; fetch the file again")
        self.asked.append(name)
        return found


def _model(size: _Sizes, prefix: str, query: str, up: str, stacked: bool) -> dict[str, Any]:
    """Returns the keys that shapes and names tell; `query`, `up`: the names of two kernels of the first block."""
    kernel = size.shape(f"{prefix}embedding/kernel", 4)
    queries, hidden = size.shape(query, 3 + stacked), size.shape(up, 2 + stacked)
    names = {name[len(prefix) :] for name in size.tensors if name.startswith(prefix)}
    blocks = {name.split("/")[1] for name in names if name.startswith("Transformer/encoderblock_")}
    pool = "map" if any(name.startswith("MAPHead_0/") for name in names) else "cls" if "cls" in names else "mean"
    has_head, has_layer = ({f"{layer}/kernel", f"{layer}/bias"} & names for layer in ("head", "pre_logits"))
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
        "pre_logits": size.shape(f"{prefix}pre_logits/kernel", 2)[1] if has_layer else None,
        "num_classes": size.shape(f"{prefix}head/kernel", 2)[1] if has_head else 0,
    }


def _positions(size: _Sizes, position: str | None, model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of positions, and of the image's size, which is square if their number is."""
    high, wide = model["patch_size"]
    if position is None:  # big_vision computes them for an image of any size, on which no parameter depends
        return {"position": "sincos2d", "cls_position": False, "image_size": (14 * high, 14 * wide)}
    count, has_cls = size.shape(position, 3)[1], model["class_token"]
    own = has_cls and math.isqrt(count) ** 2 != count  # older code added them after the class token
    side = math.isqrt(max(count - own, 0))
    if side**2 != count - own or not side:
        missing = "" if has_cls else ", or a tensor cls is missing"
        raise ConfigError(
            f"{size.file}: tensor {position} has positions for {count} tokens, {own:d} of them a class token, and the "
            f"rest is not the number of patches of a square image{missing}; resample it to one, or fetch the file again"
        )
    return {"position": "learned", "cls_position": bool(own), "image_size": (side * high, side * wide)}


def _preprocessing(source: str, has_size: bool, given: Collection[str]) -> dict[str, Any]:
    """Returns what both train and evaluate with: pixels from -1 to 1, the image resized to a square without a crop."""
    if not has_size and "model.image_size" not in given:
        raise ConfigError(f"{source}: does not say the size of its images; set model.image_size")
    keys = {"data.mean": 0.5, "data.std": 0.5, "data.interpolation": "bilinear", "data.eval_crop": None}
    return {key: value for key, value in keys.items() if key not in given}
