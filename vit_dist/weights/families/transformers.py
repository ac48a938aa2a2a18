"""transformers: ViT, DeiT, Dinov2, Dinov2WithRegisters, DINOv3ViT, and the towers of Siglip and CLIP that see.

Version 5 renamed modules, and writes the old names still; both are read. All values are the config's: a model's name
determines neither its epsilon nor its activation.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from vit_dist.config import ConfigError, Size
from vit_dist.schema import NonNegativeInt, PositiveFloat, PositiveInt
from vit_dist.weights.config_defaults import config_defaults
from vit_dist.weights.description import Description
from vit_dist.weights.naming import Entry, Naming, Part
from vit_dist.weights.origin import Origin
from vit_dist.weights.preprocessing import from_transformers
from vit_dist.weights.said import Said

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
# What is not told without a processor's config.
PREPARATION = (
    "model.image_size", "data.mean", "data.std", "data.interpolation", "data.eval_crop_mode", "data.eval_crop",
)  # fmt: skip
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
# By `model_type`; of clip and siglip the config of images is a part.
_VIT, _DINO, _TOWERS = ("vit", "deit"), ("dinov2", "dinov2_with_registers"), ("clip", "siglip")
TYPES = (*_VIT, *_DINO, "dinov3_vit", *_TOWERS, *(f"{tower}_vision_model" for tower in _TOWERS))
# Text towers and what compares them with images; what fills masked patches in training; counts from 0 up.
_LEFT_OUT = (
    "text_model\\.", "text_projection\\.", "logit_scale$", "logit_bias$", ".*mask_token$", ".*position_ids$",
)  # fmt: skip
_NORMS: dict[str, Entry] = {"norm1": "norm1.{}", "norm2": "norm2.{}"}
_QKV_OLD = tuple(f"attention.attention.{name}.{{}}" for name in ("query", "key", "value"))
_QKV_NEW = tuple(f"attention.{name}_proj.{{}}" for name in "qkv")
_SCALES: dict[str, Entry] = {"scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1"}


def recognises(origin: Origin) -> bool:
    """Returns whether transformers wrote these files."""
    return "model_type" in (origin.config or {})


def describe(origin: Origin) -> Description:
    """Returns the model of transformers' config.json; raises `ConfigError` for one that ours cannot be."""
    assert origin.config is not None
    source = str(origin.folder / "config.json")
    said = Said(origin.config, source, origin.given)
    kind = said.read("model_type", str, "init.weights")
    if kind not in TYPES:
        raise ConfigError(f"{source}: model_type: {kind!r:.60} is none of {', '.join(TYPES)}, which are read")
    own = Said(said.stated("vision_config", "init.weights"), f"{source}: vision_config") if kind in _TOWERS else said
    kind = kind.removesuffix("_vision_model")
    defaults = config_defaults("transformers")[f"{kind}_vision_model" if kind in _TOWERS else kind]
    # Where a config says nothing, the class's own value holds.
    own = Said({**defaults, **own.values}, own.source, origin.given)
    names = set(origin.tensors)
    head = bool({"classifier.weight", "classifier.bias"} & names)
    model, table = _model(kind, own, names), _TABLES[kind](names)
    classes = _classes(said)
    model["num_classes"] = (len(classes) if classes else _rows(origin, "classifier.weight")) if head else 0
    prefix = _prefix(names)
    if kind in _DINO and head:
        model["pool"] = "cls_mean"
    left_out = (*_LEFT_OUT, "pooler\\.") if kind in _VIT and not head else _LEFT_OUT
    if kind == "siglip" and head:  # it classifies the mean of the patches, whether there is a pooling head or not
        model["pool"], left_out = "mean", (*_LEFT_OUT, ".*head\\.(probe$|attention\\.|layernorm\\.|mlp\\.)")
    if kind == "clip" and head:  # it classifies the mean of the patches as the last block leaves them
        model |= {"pool": "mean", "pool_norm": "none"}
        left_out = (*_LEFT_OUT, ".*post_layernorm\\.")
    if not (kind == "clip" and head) and ("visual_projection.weight" in names or _projects(said)):
        whole = Said({"projection_dim": defaults.get("projection_dim"), **said.values}, source)
        model["output_projection"] = whole.read("projection_dim", PositiveInt, "model.output_projection")
    entries = {path: _prefixed(prefix, entry) for path, entry in table.items()}
    entries |= {"head": "classifier.{}", "output_projection": "visual_projection.{}"}
    if model["position"] == "rope2d":
        entries["attention/qkv/bias"] = _biases(own, entries["attention/qkv"])
    preprocessor = next((name for name in PREPROCESSORS if name in origin.configs), None)
    preprocessing: Callable[[Collection[str]], dict[str, Any]] = functools.partial(_unprepared, origin.folder)
    if preprocessor is not None:
        config, file = origin.configs[preprocessor], str(origin.folder / preprocessor)
        preprocessing = functools.partial(from_transformers, config, file)
    tokens = _TOKENS[kind]
    return Description(
        f"transformers, {kind}",
        model,
        Naming(
            entries,
            left_out=left_out,
            batched_tokens=kind not in _TOWERS,
            sizes_from=("classifier.weight",) if head and not classes else (),
        ),
        preprocessing,
        position=f"{prefix}{tokens[0]}" if model["position"] == "learned" else None,
        cls=f"{prefix}{tokens[1]}" if model["class_token"] else None,
        registers=tuple(f"{prefix}{name}" for name in tokens[2:]),
        classes=classes if head else None,
    )


def _unprepared(folder: Path, given: Collection[str]) -> dict[str, Any]:
    """Returns nothing, where all that a processor's config would say is given; else raises `ConfigError`."""
    missing = [key for key in PREPARATION if key not in given]
    if missing:
        raise ConfigError(
            f"{folder}: {PREPROCESSORS[0]} is missing, which says how images are prepared; fetch it too, or set "
            f"{', '.join(missing)}"
        )
    return {}


def _model(kind: str, said: Said, names: set[str]) -> dict[str, Any]:
    """Returns the keys of the model, without those of the head."""

    def key(name: str, hint: Any, ours: str) -> Any:
        return said.read(name, hint, f"model.{ours}")

    flag = "use_swiglu_ffn" if kind in _DINO else "use_gated_mlp"
    gated = said.flag(flag, False, "init.weights")
    width = key("hidden_size", PositiveInt, "width")
    model = {
        "width": width,
        "depth": key("num_hidden_layers", PositiveInt, "depth"),
        "heads": key("num_attention_heads", PositiveInt, "heads"),
        "image_size": key("image_size", Size, "image_size"),
        "patch_size": key("patch_size", Size, "patch_size"),
        "channels": key("num_channels", PositiveInt, "channels"),
        "norm_epsilon": key("layer_norm_eps", PositiveFloat, "norm_epsilon"),
        "activation": "swiglu" if gated else said.choice("hidden_act", ACTIVATIONS, "model.activation"),
        "mlp": _gated_units(said, width) if kind in _DINO else key("intermediate_size", PositiveInt, "mlp"),
        "class_token": kind != "siglip",
        "cls_position": kind not in ("siglip", "dinov3_vit"),
        "registers": 0,
        "position": "learned",
        "pool": "cls",
        "qkv_bias": True,
    }
    if gated and kind == "dinov3_vit" and said.stated("hidden_act", "model.activation") != "silu":
        raise said.refusal("hidden_act", "silu, as the MLP is gated", "model.activation")
    if kind in ("vit", *_DINO):
        model["qkv_bias"] = key("qkv_bias", bool, "qkv_bias")
    if kind in ("dinov2_with_registers", "dinov3_vit"):
        model["registers"] = key("num_register_tokens", NonNegativeInt, "registers")
    if kind == "deit":
        model["registers"] = 1  # the token that a teacher's answer is read from
    if kind in (*_DINO, "dinov3_vit"):
        model["layer_scale"] = 1.0
    if kind == "dinov3_vit":
        flags = ("query_bias", "key_bias", "value_bias")
        model["qkv_bias"] = any(said.read(name, bool, "init.weights") for name in flags)
        model["projection_bias"] = key("proj_bias", bool, "projection_bias")
        if not said.flag("mlp_bias", True, "init.weights"):
            raise said.refusal("mlp_bias", "true", "init.weights")
        model |= {"position": "rope2d", "rope_base": key("rope_theta", PositiveFloat, "rope_base")}
        rescale, jitter = (said.values.get(f"pos_embed_{name}") for name in ("rescale", "jitter"))
        model |= {"rope_rescale": rescale or 1.0, "rope_jitter": jitter or 1.0}
    if kind == "siglip":
        model["pool"] = "map" if said.flag("vision_use_head", True, "init.weights") else "mean"
    if kind == "clip":
        model |= {"embedding_norm": "tokens"}
    return model


def _gated_units(said: Said, width: int) -> int:
    """Returns the hidden units of Dinov2's MLP; a gated one has two thirds of them, rounded up to a multiple of 8."""
    hidden = int(width * said.read("mlp_ratio", PositiveFloat, "model.mlp"))
    gated = said.flag("use_swiglu_ffn", False, "init.weights")
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _prefix(names: set[str]) -> str:
    """Returns what stands before the names of the tower in a model that has more, such as a head."""
    own = (name for name in sorted(names) if "embeddings." in name and not name.startswith("text_model."))
    return next(own, "").partition("embeddings.")[0]


def _rows(origin: Origin, name: str) -> int:
    """Returns the size of a tensor's first axis; raises `ConfigError` if it is missing or has none."""
    if name not in origin.tensors or not origin.tensors[name].shape:
        raise ConfigError(f"{origin.files[0]}: tensor {name}, [classes, D], is missing; fetch the file again")
    return origin.tensors[name].shape[0]


def _projects(said: Said) -> bool:
    """Returns whether the config is that of a CLIP that projects what it pools."""
    names = said.values.get("architectures")
    return isinstance(names, list) and names[:1] in (["CLIPModel"], ["CLIPVisionModelWithProjection"])


def _prefixed(prefix: str, entry: Entry) -> Entry:
    if isinstance(entry, tuple):
        return tuple(_prefixed(prefix, one) for one in entry)  # type: ignore[misc]
    if isinstance(entry, Part):
        return Part(prefix + entry.name, entry.start, entry.stop, entry.of)
    return None if entry is None else prefix + entry


def _in_blocks(blocks: str, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    return {path: _prefixed(f"{blocks}.#.", entry) for path, entry in entries.items()}


def _vit(names: set[str]) -> dict[str, Entry]:
    """Returns the table of ViT and DeiT."""
    old = any(".layer.0." in name or name.startswith("encoder.layer.0.") for name in names)
    block: dict[str, Entry] = {
        "norm1": "layernorm_before.{}",
        "norm2": "layernorm_after.{}",
        "attention/qkv": _QKV_OLD if old else _QKV_NEW,
        "attention/projection": "attention.output.dense.{}" if old else "attention.o_proj.{}",
        "mlp/up": "intermediate.dense.{}" if old else "mlp.fc1.{}",
        "mlp/down": "output.dense.{}" if old else "mlp.fc2.{}",
    }
    ends: dict[str, Entry] = {"patch": "embeddings.patch_embeddings.projection.{}", "norm": "layernorm.{}"}
    return ends | _in_blocks("encoder.layer" if old else "layers", block)


def _dinov2(names: set[str]) -> dict[str, Entry]:
    """Returns the table of Dinov2 with and without registers."""
    old = any(".attention.attention." in name for name in names)
    whole, gated = any(".weights_in." in name for name in names), any(".gate_proj." in name for name in names)
    block: dict[str, Entry] = {
        "attention/qkv": _QKV_OLD if old else _QKV_NEW,
        "attention/projection": "attention.output.dense.{}" if old else "attention.o_proj.{}",
        "mlp/gate": Part("mlp.weights_in.{}", 0, 1, 2) if whole else "mlp.gate_proj.{}",
        "mlp/up": Part("mlp.weights_in.{}", 1, 2, 2) if whole else "mlp.up_proj.{}" if gated else "mlp.fc1.{}",
        "mlp/down": "mlp.weights_out.{}" if whole else "mlp.down_proj.{}" if gated else "mlp.fc2.{}",
        **_NORMS,
        **_SCALES,
    }
    ends: dict[str, Entry] = {"patch": "embeddings.patch_embeddings.projection.{}", "norm": "layernorm.{}"}
    return ends | _in_blocks("encoder.layer", block)


def _dinov3(names: set[str]) -> dict[str, Entry]:
    """Returns the table of DINOv3ViT."""
    block: dict[str, Entry] = {
        "attention/qkv": _QKV_NEW,
        "attention/projection": "attention.o_proj.{}",
        **{f"mlp/{name}": f"mlp.{name}_proj.{{}}" for name in ("gate", "up", "down")},
        **_NORMS,
        **_SCALES,
    }
    blocks = "model.layer" if any(name.startswith("model.layer.0.") for name in names) else "layer"
    return {"patch": "embeddings.patch_embeddings.{}", "norm": "norm.{}"} | _in_blocks(blocks, block)


def _tower(names: set[str]) -> dict[str, Entry]:
    """Returns the table of CLIP's and Siglip's towers."""
    qkv = tuple(f"self_attn.{name}_proj.{{}}" for name in "qkv")
    block: dict[str, Entry] = {
        "norm1": "layer_norm1.{}",
        "norm2": "layer_norm2.{}",
        "attention/qkv": qkv,
        "attention/projection": "self_attn.out_proj.{}",
        "mlp/up": "mlp.fc1.{}",
        "mlp/down": "mlp.fc2.{}",
    }
    parts = [Part("head.attention.in_proj_{}", i, i + 1, 3) for i in range(3)]
    return _in_blocks("encoder.layers", block) | {
        "patch": "embeddings.patch_embedding.{}",
        "norm": "post_layernorm.{}",
        "pool/probe": "head.probe",
        "pool/query": parts[0],
        "pool/key_value": tuple(parts[1:]),
        "pool/projection": "head.attention.out_proj.{}",
        "pool/norm": "head.layernorm.{}",
        "pool/mlp/up": "head.mlp.fc1.{}",
        "pool/mlp/down": "head.mlp.fc2.{}",
    }


def _clip(names: set[str]) -> dict[str, Entry]:
    """Returns the table of CLIP's tower, whose norm before the blocks has this very name."""
    return _tower(names) | {"embedding_norm": "pre_layrnorm.{}", "patch/bias": None}


def _biases(said: Said, qkv: Entry) -> Entry:
    """Returns the entries of the biases of queries, keys and values, of which the config may leave some out."""
    assert isinstance(qkv, tuple)
    flags = ("query_bias", "key_bias", "value_bias")
    present = (said.read(flag, bool, "init.weights") for flag in flags)
    return tuple(entry if has else None for has, entry in zip(present, qkv, strict=True))


def _classes(said: Said) -> tuple[str, ...] | None:
    """Returns the names of the classes in `id2label`, in the order of their numbers."""
    labels = said.values.get("id2label")
    if not labels or not isinstance(labels, Mapping):
        return None
    numbers = list(map(str, range(len(labels))))
    if not all(number in labels for number in numbers):
        return None
    return tuple(str(labels[number]) for number in numbers)


_TABLES = {
    "vit": _vit, "deit": _vit, "dinov2": _dinov2, "dinov2_with_registers": _dinov2, "dinov3_vit": _dinov3,
    "clip": _clip, "siglip": _tower,
}  # fmt: skip
# Positions, class token and other special tokens.
_TOKENS: dict[str, tuple[str, ...]] = {
    "vit": ("embeddings.position_embeddings", "embeddings.cls_token"),
    "deit": ("embeddings.position_embeddings", "embeddings.cls_token", "embeddings.distillation_token"),
    "dinov2": ("embeddings.position_embeddings", "embeddings.cls_token"),
    "dinov2_with_registers": (
        "embeddings.position_embeddings", "embeddings.cls_token", "embeddings.register_tokens",
    ),
    "dinov3_vit": ("", "embeddings.cls_token", "embeddings.register_tokens"),
    "clip": ("embeddings.position_embedding.weight", "embeddings.class_embedding"),
    "siglip": ("embeddings.position_embedding.weight", ""),
}  # fmt: skip
