"""OpenCLIP: the tower of a CLIP that sees, a plain ViT with a projection."""

import functools
from typing import Any

from vit_dist.config import ConfigError, Size
from vit_dist.schema import PositiveFloat, PositiveInt
from vit_dist.weights.config_defaults import config_defaults
from vit_dist.weights.description import Description
from vit_dist.weights.naming import Entry, Naming, Part
from vit_dist.weights.origin import Origin
from vit_dist.weights.preprocessing import from_open_clip
from vit_dist.weights.said import Said

FILE = "open_clip_config.json"
_BLOCKS = "visual.transformer.resblocks.#"
# What a vision_cfg may say that changes a plain ViT; ours is what its default says. What is neither here nor read
# below, such as the rate of dropped patches, matters in training only.
_FIXED = (
    "ls_init_value", "attentional_pool", "no_ln_pre", "pos_embed_type", "final_ln_after_pool", "pool_type",
    "output_tokens", "act_kwargs", "norm_kwargs", "block_type", "qk_norm", "scaled_cosine_attn", "scale_heads",
    "scale_attn", "scale_attn_inner", "scale_fc", "timm_model_name",
)  # fmt: skip
# The text tower, and what compares texts with images.
_LEFT_OUT = (
    "transformer\\.", "token_embedding\\.", "positional_embedding$", "ln_final\\.", "text_projection", "text\\.",
    "logit_scale$", "logit_bias$",
)  # fmt: skip
_TABLE: dict[str, Entry] = {
    "patch": "visual.conv1.{}",
    "patch/bias": None,
    "embedding_norm": "visual.ln_pre.{}",
    "norm": "visual.ln_post.{}",
    "norm1": f"{_BLOCKS}.ln_1.{{}}",
    "norm2": f"{_BLOCKS}.ln_2.{{}}",
    "attention/qkv": tuple(Part(f"{_BLOCKS}.attn.in_proj_{{}}", i, i + 1, 3) for i in range(3)),
    "attention/projection": f"{_BLOCKS}.attn.out_proj.{{}}",
    "mlp/up": f"{_BLOCKS}.mlp.c_fc.{{}}",
    "mlp/down": f"{_BLOCKS}.mlp.c_proj.{{}}",
    "output_projection/kernel": "visual.proj",
}


def recognises(origin: Origin) -> bool:
    """Returns whether OpenCLIP wrote these files."""
    return any(name.startswith(("visual.conv1.", "visual.transformer.resblocks.")) for name in origin.tensors)


def describe(origin: Origin) -> Description:
    """Returns the model of open_clip_config.json; raises `ConfigError` for one that ours cannot be."""
    source = str(origin.folder / FILE)
    if FILE not in origin.configs:
        raise ConfigError(f"{source}: is not there, which says what OpenCLIP's weights are; fetch it too")
    whole = Said(origin.configs[FILE], source, origin.given)
    cfg = Said(whole.stated("model_cfg", "init.weights"), f"{source}: model_cfg", origin.given)
    defaults = config_defaults("open_clip")
    values = Said(cfg.stated("vision_cfg", "init.weights"), f"{source}: vision_cfg").values
    said = Said({**defaults, **values}, f"{source}: vision_cfg", origin.given)
    for name in _FIXED:
        if said.values[name] != defaults[name]:
            raise said.refusal(name, f"{defaults[name]!r}, as our model is", "init.weights")
    width = said.read("width", PositiveInt, "model.width")
    image_size = said.read("image_size", Size, "model.image_size")
    model: dict[str, Any] = {
        "width": width,
        "depth": said.read("layers", PositiveInt, "model.depth"),
        "heads": width // said.read("head_width", PositiveInt, "model.heads"),
        "mlp": int(width * said.read("mlp_ratio", PositiveFloat, "model.mlp")),
        "image_size": image_size,
        "patch_size": said.read("patch_size", Size, "model.patch_size"),
        "norm_epsilon": defaults["norm_epsilon"],
        "activation": "quick_gelu" if cfg.flag("quick_gelu", False, "init.weights") else defaults["activation"],
        "embedding_norm": "tokens",
        "output_projection": cfg.read("embed_dim", PositiveInt, "model.output_projection"),
        "num_classes": 0,
    }
    preprocess = whole.values.get("preprocess_cfg", {})
    return Description(
        "OpenCLIP",
        model,
        Naming(_TABLE, left_out=_LEFT_OUT, as_stored=("output_projection/kernel",), batched_tokens=False),
        functools.partial(_preprocessing, preprocess, image_size, f"{source}: preprocess_cfg"),
        position="visual.positional_embedding",
        cls="visual.class_embedding",
    )


def _preprocessing(preprocess: Any, image_size: Size, source: str, given: Any) -> dict[str, Any]:
    return from_open_clip(preprocess, image_size, source, given)
