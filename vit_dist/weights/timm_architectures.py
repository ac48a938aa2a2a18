"""What timm's config.json says of a model, as keys of our config.

It names an architecture, and in `model_args` the arguments that differ from those of its name. What a name implies is
in `timm_architectures.json`, which `benchmarks/peers/architectures.py` writes by asking timm. Here the arguments become
keys; an argument that our model cannot be, or that is not known, is an error that names it.
"""

import functools
import importlib.resources
import json
import math
from collections.abc import Mapping
from typing import Any

from vit_dist.config import ConfigError, pair
from vit_dist.weights.stored_tensor import printed

SIZES = ("img_size", "patch_size")
POOLS = {"token": "cls", "avg": "mean", "map": "map"}
# Arguments that our model has no key for, with the values that it is.
FIXED: dict[str, tuple] = {
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "embed_layer": ("PatchEmbed",),
    "attn_layer": ("Attention", "", "attn"),
    "block_fn": ("Block", "ParallelScalingBlock"),
    "mlp_layer": ("Mlp", "GluMlp", "SwiGLU"),
    "pos_embed": ("learn", "none", ""),
    "num_kv_heads": (None,),
    "scale_mlp": (False,),
    "scale_attn_inner": (False,),
    "attn_type": ("eva", "rope"),
    "attn_only_layer_scale": (False,),
    "rope_grid_offset": (0.0,),
    "rope_grid_indexing": ("ij",),
    "rope_mrope_section": (None,),
    "use_post_norm": (False,),
    "attn_pool_num_heads": (None,),
    "attn_pool_mlp_ratio": (None,),
    "ref_feat_shape": (None,),
}


@functools.cache
def table() -> dict[str, Any]:
    """Returns what timm was asked; see `benchmarks/peers/architectures.py`."""
    return json.loads(importlib.resources.files("vit_dist.weights").joinpath("timm_architectures.json").read_text())


def model_keys(config: Mapping[str, Any], file: str = "config.json") -> dict[str, Any]:
    """Returns the keys of `model` that timm's config.json says.

    The file may have a learned position for a token that has none by these keys; it is to be added to the token.
    `layer_scale` is 1.0 or None: whether there is one.

    Args:
      config: the content of the file.
      file: its name, for errors.

    Raises:
      ConfigError: the architecture is not known, or our model cannot be it.
    """
    cls, given = arguments(config, file)
    return _eva(given, file) if cls == "Eva" else _plain(given, file)


def arguments(config: Mapping[str, Any], file: str = "config.json") -> tuple[str, dict[str, Any]]:
    """Returns the class of the model that timm's config.json says, and all arguments that it is called with.

    Raises `ConfigError` as `model_keys`.
    """
    name, given = config.get("architecture"), config.get("model_args", {})
    rows = table()["architectures"]
    cls = next((cls for cls in rows if isinstance(name, str) and name in rows[cls]), None)
    if cls is None:
        known = sum(map(len, rows.values()))
        raise ConfigError(
            f"{file}: architecture: {name!r:.60} is none of the {known} of timm {table()['timm']} known here"
        )
    if name in table()["unsupported"]:
        lacking = ", ".join(table()["unsupported"][name])
        raise ConfigError(f"{file}: architecture: our model cannot be {name}, which has: {lacking}")
    if not isinstance(given, Mapping):
        raise ConfigError(f"{file}: model_args: expected an object, found {type(given).__name__}")
    defaults = table()["defaults"][cls]
    checked = {
        key: _checked(key, value, defaults, f"{file}: model_args.{printed(key)}")
        for key, value in given.items()
        if key not in table()["ignored"]
    }
    merged = {**defaults, **_implied(config, defaults, file), **rows[cls][name], **checked}
    for key, allowed in FIXED.items():
        if key in merged and merged[key] not in allowed:
            raise ConfigError(f"{file}: model_args.{key}: our model cannot be {merged[key]!r:.60}")
    return cls, merged


def _checked(key: str, value: Any, defaults: Mapping[str, Any], where: str) -> Any:
    """Returns the value of an argument, a layer in the words of the table; raises `ConfigError` for another type."""
    if key not in defaults:
        raise ConfigError(f"{where}: is not known here; remove it if it changes no output")
    layers = table()["layers"].get("norm_layer" if key == "embed_norm_layer" else key)
    if layers is not None:
        if value is None:
            return defaults[key]
        text = str(value) if key == "act_layer" else str(value).replace("_", "").lower()
        if text not in layers:
            raise ConfigError(f"{where}: {value!r:.60} is none of {', '.join(layers)}")
        return layers[text]
    default = defaults[key]
    if key in SIZES:
        sides = value if isinstance(value, list) and len(value) == 2 else [value]
        fits = all(type(side) is int and side > 0 for side in sides)
    elif isinstance(default, bool | str):
        fits = isinstance(value, type(default))
    elif default is None:
        fits = value is None or isinstance(value, bool | int | float)
    else:
        fits = type(value) is int or (isinstance(default, float) and isinstance(value, float) and math.isfinite(value))
    if not fits:
        expected = "a size" if key in SIZES else f"a value like {default!r}"
        raise ConfigError(f"{where}: expected {expected}, found {value!r:.60}")
    return value


def _implied(config: Mapping[str, Any], defaults: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Returns the arguments that follow from `pretrained_cfg`; an old file has its keys at the top."""
    source = config.get("pretrained_cfg", config)
    if not isinstance(source, Mapping):
        raise ConfigError(f"{file}: pretrained_cfg: expected an object, found {type(source).__name__}")
    values = {key: source[key] for key in ("num_classes", "global_pool") if source.get(key) is not None}
    if config.get("num_classes") is not None:
        values["num_classes"] = config["num_classes"]
    size = source.get("input_size")
    if size is not None:
        if not isinstance(size, list) or len(size) != 3:
            raise ConfigError(
                f"{file}: pretrained_cfg.input_size: expected [channels, height, width], found {size!r:.60}"
            )
        values["in_chans"] = size[0]
        if source.get("fixed_input_size"):
            values["img_size"] = size[1:]
    return {key: _checked(key, value, defaults, f"{file}: {key}") for key, value in values.items()}


def _plain(arguments: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Returns the keys of a VisionTransformer."""
    keys = _common(arguments, arguments["reg_tokens"], arguments["pos_embed"] == "learn", file)
    after = arguments["global_pool"] == "avg" if arguments["fc_norm"] is None else arguments["fc_norm"]
    norms = (not after, bool(after)) if arguments["final_norm"] else (False, False)
    gated, activation = arguments["mlp_layer"] != "Mlp", arguments["act_layer"]
    if gated != (activation == "silu"):
        raise ConfigError(
            f"{file}: model_args.act_layer: our model cannot be {activation!r} in {arguments['mlp_layer']}"
        )
    if arguments["embed_norm_layer"] not in (None, arguments["norm_layer"]):
        raise ConfigError(f"{file}: model_args.embed_norm_layer: our model cannot be another norm than norm_layer")
    if arguments["pre_norm"] and arguments["embed_norm_layer"]:
        raise ConfigError(f"{file}: model_args.pre_norm: our model cannot have it beside embed_norm_layer")
    if arguments["pool_include_prefix"] and keys["pool"] != "cls" and keys["registers"]:
        raise ConfigError(f"{file}: model_args.pool_include_prefix: our model pools patches alone")
    return _finished(keys, gated, activation, norms, file) | {
        "mlp": int(arguments["embed_dim"] * arguments["mlp_ratio"]) // (2 if arguments["mlp_layer"] == "GluMlp" else 1),
        "parallel": arguments["block_fn"] == "ParallelScalingBlock",
        "projection_bias": arguments["proj_bias"],
        "layer_scale": 1.0 if arguments["init_values"] else None,
        "embedding_norm": "tokens" if arguments["pre_norm"] else "patches" if arguments["embed_norm_layer"] else "none",
    }


def _eva(arguments: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Returns the keys of an Eva, the class of DINOv3."""
    rotated, learned = arguments["use_rot_pos_emb"], arguments["use_abs_pos_emb"]
    if rotated and (arguments["rope_type"] != "dinov3" or not arguments["rope_rotate_half"] or learned):
        raise ConfigError(
            f"{file}: model_args.rope_type: our model rotates positions as DINOv3 does (rope_type=dinov3, "
            "rope_rotate_half, without use_abs_pos_emb), or not at all"
        )
    keys = _common(arguments, arguments["num_reg_tokens"], learned, file)
    if rotated:
        keys |= {"position": "rope2d", "rope_base": float(arguments["rope_temperature"])}
    after, before = arguments["use_fc_norm"], arguments["use_post_transformer_norm"]
    after = arguments["global_pool"] == "avg" if after is None else after
    before = not after if before is None else before
    gated, step = arguments["swiglu_mlp"], arguments["swiglu_align_to"]
    hidden = int(arguments["embed_dim"] * arguments["mlp_ratio"])
    return _finished(keys, gated, "gelu", (bool(before), bool(after)), file) | {
        "mlp": hidden + (-hidden % step if gated and step else 0),
        "parallel": False,
        "projection_bias": True,
        "layer_scale": None if arguments["init_values"] is None else 1.0,
        "embedding_norm": "tokens" if arguments["use_pre_transformer_norm"] else "none",
    }


def _common(arguments: Mapping[str, Any], registers: int, learned: bool, file: str) -> dict[str, Any]:
    """Returns the keys that both classes have the same arguments for."""
    if arguments["global_pool"] not in POOLS:
        raise ConfigError(f"{file}: global_pool: {arguments['global_pool']!r:.60} is none of {', '.join(POOLS)}")
    pool = POOLS[arguments["global_pool"]]
    norm, epsilon = arguments["norm_layer"]
    return {
        "width": arguments["embed_dim"],
        "depth": arguments["depth"],
        "heads": arguments["num_heads"],
        "image_size": pair(_size(arguments["img_size"])),
        "patch_size": pair(_size(arguments["patch_size"])),
        "channels": arguments["in_chans"],
        "num_classes": arguments["num_classes"],
        "norm": norm,
        "norm_epsilon": epsilon,
        "qk_norm": arguments["qk_norm"],
        "qk_norm_bias": arguments["qk_norm"] and norm == "layernorm",
        "qkv_bias": arguments["qkv_bias"],
        "pool": pool,
        "class_token": arguments["class_token"],
        "registers": registers,
        "position": "learned" if learned else "none",
        "cls_position": arguments["class_token"] and learned and not arguments["no_embed_class"],
    }


def _finished(
    keys: dict[str, Any], gated: bool, activation: str, norms: tuple[bool, bool], file: str
) -> dict[str, Any]:
    """Returns the keys with those of the MLP's activation, and of the norms before and after the pooling."""
    if gated and keys["pool"] == "map":
        raise ConfigError(f"{file}: global_pool: our model cannot be 'map' over blocks with a gated MLP")
    pool_norm = {(True, False): "before", (False, True): "after", (True, True): "both", (False, False): "none"}[norms]
    return keys | {"activation": "swiglu" if gated else activation, "pool_norm": pool_norm}


def _size(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
