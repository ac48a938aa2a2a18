"""Asks timm what the name of an architecture implies, for those who read its weights without timm.

    PYTHONPATH=benchmarks .cache/peers/bin/python -m peers.architectures

timm's config.json names an architecture, and gives the arguments (`model_args`) that differ from those of its name. The
model of the file is therefore its class, called with four dicts of arguments, of which a later one wins: the class's
defaults, what `pretrained_cfg` implies, those of the name, `model_args`. `vit_dist/weights/timm_architectures.json`
holds the first and the third, as they reach the class's constructor:

- `timm`: the version that was asked.
- `ignored`: arguments that change no output of an evaluation.
- `layers`: what a layer means that `model_args` name by a text, such as {"act_layer": "quick_gelu"}.
- `defaults`: the default arguments of each class.
- `unsupported`: for each name that our model cannot be, what it lacks.
- `architectures`: by class, for each name the arguments that differ from the defaults.

Layers are given by what they compute: a norm as [norm, norm_epsilon] and an activation by its name in our config (or
"silu", the gate of our `swiglu`), whatever timm calls it. All of it is found by calling and inspecting timm.

`tests/weights/golden/timm_keys.json` holds our own keys for each architecture, and for some with `model_args`, found in
a second way: from the modules of the constructed model, and not from its arguments. A module or attribute that is not
known here is reported as unsupported. `base` are the commonest keys, a row gives those that differ:
[architecture, model_args, pretrained_cfg, keys, or what is unsupported]. A test compares the two ways.
"""

import functools
import inspect
import json
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import timm
from timm.layers import create_act, create_norm, get_act_layer, get_norm_layer
from timm.models import deit, eva, vision_transformer
from torch import nn

from peers.inspected import ACTIVATIONS, Inspector, activation, norm

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = ROOT / "vit_dist/weights/timm_architectures.json"
KEYS = ROOT / "tests/weights/golden/timm_keys.json"

IGNORED = (
    "drop_rate pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate weight_init fix_init"
    " head_init_scale device dtype dynamic_img_size dynamic_img_pad strict_img_size rope_shift_coords"
    " rope_jitter_coords rope_rescale_coords"
).split()
# Configs as people write them: other heads and pools, and each argument that changes the model's form.
OVERRIDES: list[tuple[str, dict[str, Any]]] = [
    ("vit_base_patch16_224", {"num_classes": 10, "global_pool": "avg", "img_size": [224, 224], "in_chans": 3}),
    ("vit_base_patch16_224", {"num_classes": 0, "global_pool": ""}),
    ("vit_base_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    ("vit_base_patch16_224", {"fc_norm": True}),
    ("vit_base_patch16_224", {"final_norm": False}),
    ("vit_base_patch16_224", {"final_norm": False, "global_pool": "avg"}),
    ("vit_base_patch16_224", {"global_pool": "map", "class_token": False}),
    ("vit_base_patch16_224", {"global_pool": "map", "fc_norm": True}),
    ("vit_base_patch16_224", {"global_pool": "avgmax"}),
    ("vit_base_patch16_224", {"global_pool": "prr"}),
    ("vit_base_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    ("vit_base_patch16_224", {"global_pool": "avg", "class_token": False, "pool_include_prefix": True}),
    ("vit_base_patch16_224", {"class_token": False, "global_pool": "avg", "reg_tokens": 4}),
    ("vit_base_patch16_224", {"reg_tokens": 4}),
    ("vit_base_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    ("vit_base_patch16_224", {"pos_embed": "none"}),
    ("vit_base_patch16_224", {"qk_norm": True, "init_values": 0.1}),
    ("vit_base_patch16_224", {"qk_norm": True, "norm_layer": "rmsnorm"}),
    ("vit_base_patch16_224", {"qkv_bias": False, "proj_bias": False, "init_values": 0}),
    ("vit_base_patch16_224", {"act_layer": "gelu_tanh", "norm_layer": "layernorm"}),
    ("vit_base_patch16_224", {"act_layer": "quick_gelu", "pre_norm": True}),
    ("vit_base_patch16_224", {"act_layer": "silu"}),
    ("vit_base_patch16_224", {"norm_layer": "simplenorm"}),
    ("vit_base_patch16_224", {"embed_norm_layer": "rmsnorm", "norm_layer": "rmsnorm"}),
    ("vit_base_patch16_224", {"embed_norm_layer": "rmsnorm"}),
    ("vit_base_patch16_224", {"scale_attn_norm": True}),
    ("vit_base_patch16_224", {"scale_mlp_norm": True}),
    ("vit_base_patch16_224", {"attn_layer": "diff"}),
    ("vit_base_patch16_224", {"patch_size": 8, "img_size": [64, 96], "in_chans": 1, "embed_dim": 192, "num_heads": 3}),
    ("vit_base_patch16_224", {"dynamic_img_size": True, "img_size": 256, "drop_path_rate": 0.1, "depth": 3}),
    ("vit_base_patch16_clip_224", {"act_layer": "quick_gelu", "num_classes": 0}),
    ("vit_base_patch16_clip_224", {"norm_layer": "layernorm"}),
    ("vit_base_patch16_siglip_224", {"global_pool": "avg", "fc_norm": False}),
    ("vit_base_patch16_siglip_224", {"global_pool": "avg"}),
    ("vit_base_patch16_siglip_224", {"act_layer": "gelu_tanh", "num_classes": 5}),
    ("vit_giant_patch14_dinov2", {"act_layer": "gelu"}),
    ("aimv2_large_patch14_224", {"norm_layer": "rmsnorm"}),
    ("aimv2_large_patch14_224", {"global_pool": "map"}),
    ("vit_base_patch16_xp_224", {"init_values": 0.1}),
    ("vit_small_patch16_dinov3", {"global_pool": "token", "num_classes": 7}),
    ("vit_small_patch16_dinov3", {"use_fc_norm": True, "img_size": 224}),
    ("vit_small_patch16_dinov3", {"use_fc_norm": True, "use_post_transformer_norm": True}),
    ("vit_small_patch16_dinov3", {"rope_temperature": 10.0, "qk_norm": True}),
    ("vit_small_patch16_dinov3", {"rope_rotate_half": False}),
    ("vit_small_patch16_dinov3", {"rope_type": "cat"}),
    ("vit_small_patch16_dinov3", {"use_abs_pos_emb": True}),
    ("vit_small_patch16_dinov3", {"use_rot_pos_emb": False, "use_abs_pos_emb": True, "swiglu_mlp": True}),
    ("vit_small_patch16_dinov3", {"use_pre_transformer_norm": True, "num_reg_tokens": 0}),
    ("vit_small_patch16_dinov3", {"qkv_fused": False, "qkv_bias": True, "init_values": None}),
    ("vit_small_patch16_dinov3", {"attn_type": "rope", "swiglu_mlp": True, "swiglu_align_to": 8}),
    ("vit_small_patch16_dinov3", {"scale_mlp": True, "swiglu_mlp": True}),
    ("vit_small_patch16_dinov3", {"scale_attn_inner": True}),
    ("vit_small_patch16_dinov3", {"attn_only_layer_scale": True}),
    ("vit_small_patch16_dinov3", {"use_post_norm": True}),
    ("vit_base_patch16_224", {"norm_layer": None, "act_layer": None, "fc_norm": None, "init_values": None}),
    ("vit_base_patch16_clip_quickgelu_224", {"norm_layer": None, "act_layer": None}),
    ("deit3_small_patch16_224", {"img_size": 384}),
]


def names() -> Iterator[str]:
    """Yields the plain ViTs, DeiT and DeiT-III, and those of EVA's module with DINOv3's rotation of positions."""
    yield from timm.list_models(module="vision_transformer")
    yield from timm.list_models(module="deit")
    for name in timm.list_models(module="eva"):
        if any(type(module).__name__ == "RotaryEmbeddingDinoV3" for module in build(name)[0].modules()):
            yield name


@functools.cache
def build(name: str, **arguments: Any) -> tuple[nn.Module, str, dict[str, Any]]:
    """Builds a model without memory for its weights.

    Returns:
      The model, the name of its class, and the arguments that its constructor was called with, but for those that
      `pretrained_cfg` implies.
    """
    calls: list[tuple[str, dict[str, Any]]] = []

    def recorded(cls: type, *positional: Any, **passed: Any) -> nn.Module:
        known = inspect.signature(base(cls)).parameters
        calls.append((cls.__name__, {key: value for key, value in passed.items() if key in known}))
        return original(cls, *positional, **passed)

    modules = (vision_transformer, deit, eva)
    original = vision_transformer.build_model_with_cfg
    for module in modules:
        module.build_model_with_cfg = recorded
    try:
        model = timm.create_model(name, device="meta", **arguments)
    finally:
        for module in modules:
            module.build_model_with_cfg = original
    ((class_name, passed),) = calls
    passed.pop("device")
    return model, class_name, passed


def base(cls: type) -> type:
    """Returns the class whose constructor declares the arguments."""
    return eva.Eva if issubclass(cls, eva.Eva) else vision_transformer.VisionTransformer


def as_json(key: str, value: Any) -> Any:
    """Returns an argument in the words of the file."""
    if key in ("norm_layer", "embed_norm_layer") and value is not None:
        return norm(get_norm_layer(value)(8))
    if key == "act_layer" and value is not None:
        return activation(get_act_layer(value)())
    if key == "mlp_layer":
        layer = value(8, 16, act_layer=nn.SiLU)
        order = "" if getattr(layer, "gate_last", False) is False else "(gate_last)"
        return type(layer).__name__ + order
    if key == "attn_layer" and isinstance(value, str):
        value = vision_transformer.ATTN_LAYERS[value]
    return value.__name__ if isinstance(value, type) else value


def defaults(cls: Any) -> dict[str, Any]:
    """Returns the default arguments of a class; where None stands for a layer, that layer."""
    signature = inspect.signature(cls).parameters.values()
    values: dict[str, Any] = {item.name: item.default for item in signature if item.name not in IGNORED}
    first: Any = cls(device="meta").blocks[0]
    if values["norm_layer"] is None:
        values["norm_layer"] = functools.partial(first.norm1.__class__, eps=first.norm1.eps)
    if "act_layer" in values:
        values["act_layer"] = first.mlp.act.__class__
    return {key: as_json(key, value) for key, value in values.items()}


def layers() -> dict[str, dict[str, Any]]:
    """Returns what the texts for layers mean that timm knows, as far as our model can be them."""
    norms = {
        name: norm(cls(8)) for name, cls in create_norm._NORM_MAP.items() if re.match(r"(layer|rms)norm(fp32)?$", name)
    }
    kinds = {name: activation(get_act_layer(name)()) for name in create_act._ACT_LAYER_DEFAULT}
    return {"norm_layer": norms, "act_layer": {name: kind for name, kind in kinds.items() if kind in ACTIVATIONS}}


def main() -> None:
    classes = {cls.__name__: defaults(cls) for cls in (vision_transformer.VisionTransformer, eva.Eva)}
    architectures: dict[str, dict[str, Any]] = {}
    unsupported: dict[str, list[str]] = {}
    rows: list[tuple[str, dict[str, Any], Inspector]] = []
    for name in names():
        model, class_name, arguments = build(name)
        inspector = Inspector(model)
        given = {key: as_json(key, value) for key, value in arguments.items() if key not in IGNORED}
        usual = classes.get(class_name, {})
        differing = {key: value for key, value in given.items() if key not in usual or usual[key] != value}
        architectures.setdefault(class_name, {})[name] = differing
        if inspector.unsupported:
            unsupported[name] = sorted(inspector.unsupported)
        rows.append((name, {}, inspector))
    for name, overrides in OVERRIDES:
        rows.append((name, overrides, Inspector(from_config(name, overrides))))
    head = {"timm": timm.__version__, "ignored": IGNORED, "layers": layers()}
    write(TABLE, head | {"defaults": classes, "unsupported": unsupported, "architectures": architectures})
    base = {key: common([row[2].keys[key] for row in rows if key in row[2].keys]) for key in rows[0][2].keys}
    write(KEYS, {"timm": timm.__version__, "base": base, "models": [expectation(base, *row) for row in rows]})
    report(architectures, unsupported)


def from_config(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Builds a model from a config.json with `model_args`, as timm does it when it loads weights."""
    source = timm.models.get_pretrained_cfg(name).to_dict(remove_source=True)
    config = {"architecture": name, "model_args": arguments, "pretrained_cfg": source}
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        return timm.create_model(f"local-dir:{folder}", device="meta")


def common(values: list) -> Any:
    """Returns the value that occurs most often."""
    return max(values, key=values.count)


def expectation(base: dict[str, Any], name: str, arguments: dict[str, Any], inspector: Inspector) -> list:
    """Returns a row of KEYS."""
    source = inspector.model.pretrained_cfg
    implied = {key: source[key] for key in ("num_classes", "input_size", "fixed_input_size")}
    if inspector.unsupported:
        return [name, arguments, implied, sorted(inspector.unsupported)]
    differing = {key: value for key, value in inspector.keys.items() if base.get(key) != value}
    return [name, arguments, implied, differing]


def write(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes JSON with a line for each item of the first two levels, and of the third for architectures."""

    def lines(value: Any, depth: int) -> str:
        if depth == 0 or not isinstance(value, dict | list) or not value:
            return json.dumps(value)
        indent, end = " " * (4 - depth), " " * (3 - depth)
        if isinstance(value, list):
            inner, brackets = [json.dumps(item) for item in value], "[]"
        else:
            inner, brackets = [f"{json.dumps(key)}: {lines(item, depth - 1)}" for key, item in value.items()], "{}"
        return brackets[0] + "\n" + ",\n".join(indent + item for item in inner) + "\n" + end + brackets[1]

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(content, 3) + "\n")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


def report(architectures: dict[str, dict[str, Any]], unsupported: dict[str, list[str]]) -> None:
    """Prints how many architectures our model can be."""
    known = {name for rows in architectures.values() for name in rows}
    for module in ("vision_transformer", "deit", "eva"):
        listed = [name for name in timm.list_models(module=module) if name in known]
        left = [name for name in listed if name in unsupported]
        print(f"{module}: {len(listed) - len(left)} of {len(listed)} are representable")
        for name in left:
            print(f"  {name}: {', '.join(unsupported[name])}")


if __name__ == "__main__":
    main()
