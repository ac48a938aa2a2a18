"""What transformers would write of a model of ours: the class that is nearest to it, with its config.

The names of its tensors are those of `transformers`, which reads them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.weights.description import Draft, Subject
from vit_dist.weights.families import transformers
from vit_dist.weights.naming import Shape
from vit_dist.weights.origin import Origin
from vit_dist.weights.prepared import processor_config
from vit_dist.weights.stored_tensor import stubs
from vit_dist.weights.traits import full_traits_of

Traits = Mapping[str, Any]
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
# Of `model_type`: the beginnings of its classes' names, and what stands before its tensors in a model with a head.
_CLASSES = {
    "vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters",
    "dinov3_vit": "DINOv3ViT", "siglip": "Siglip", "clip": "CLIP",
}  # fmt: skip
_TOWER = "vision_model."


def draft(subject: Subject) -> Draft:
    """Returns the files of the nearest class; raises `ConfigError` where no class has the model's head or crop."""
    traits = full_traits_of(subject.model)
    kind, classes = _kind(traits), traits["num_classes"]
    if kind == "dinov3_vit" and classes:
        raise ConfigError(
            f"model.num_classes: {classes}, but transformers has no classifier with model.position=rope2d; export "
            "--format=timm or safetensors"
        )
    tower, projects = kind in ("siglip", "clip"), traits["output_projection"] is not None
    own = _values(kind, traits, subject)
    config: dict[str, Any] = {"architectures": [_class(kind, bool(classes), projects)], "dtype": "float32"}
    if classes:
        names = subject.classes or tuple(f"LABEL_{number}" for number in range(classes))
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
    if tower and classes:
        config |= {"model_type": kind, "vision_config": {"model_type": f"{kind}_vision_model", **own}}
        config["text_config"] = {"model_type": f"{kind}_text_model"}
    else:
        config |= {"model_type": f"{kind}_vision_model" if tower else kind, **own}
    prefix = _TOWER if tower and (classes or projects) else f"{kind}." if classes else ""
    names_there = {f"{prefix}{name}": () for name in _markers(kind, traits)}
    names_there |= {"classifier.weight": ()} if classes else {}
    names_there |= {"visual_projection.weight": ()} if projects else {}
    configs = {"config.json": config, "preprocessor_config.json": processor_config(subject)}
    described = transformers.describe(Origin(stubs(names_there), configs, (Path("model.safetensors"),)))
    tokens = {"deit": 2, "dinov3_vit": 0, "siglip": 0}
    unused = {f"{prefix}{name}": shape for name, shape in _unused(kind, traits["width"], bool(classes)).items()}
    return Draft(described, configs, before=tokens.get(kind, 1), unused=unused)


def _kind(traits: Traits) -> str:
    """Returns the `model_type` that is nearest."""
    if traits["position"] == "rope2d":
        return "dinov3_vit"
    if traits["embedding_norm"] == "tokens" or traits["output_projection"]:
        return "clip"
    if not traits["class_token"]:
        return "siglip"
    scaled = traits["layer_scale"] is not None or traits["activation"] == "swiglu"
    if scaled or traits["pool"] != "cls" or traits["registers"] > 1:
        return "dinov2_with_registers" if traits["registers"] else "dinov2"
    return "deit" if traits["registers"] else "vit"


def _class(kind: str, has_head: bool, projects: bool) -> str:
    if has_head:
        return f"{_CLASSES[kind]}ForImageClassification"
    if kind in ("siglip", "clip"):
        return f"{_CLASSES[kind]}VisionModel{'WithProjection' if projects else ''}"
    return f"{_CLASSES[kind]}Model"


def _values(kind: str, traits: Traits, subject: Subject) -> dict[str, Any]:
    """Returns the config of a model or tower, without its head."""
    gated = traits["activation"] == "swiglu"
    values: dict[str, Any] = {
        "hidden_size": traits["width"],
        "num_hidden_layers": traits["depth"],
        "num_attention_heads": traits["heads"],
        "image_size": _side(traits["image_size"]),
        "patch_size": _side(traits["patch_size"]),
        "num_channels": traits["channels"],
        "layer_norm_eps": traits["norm_epsilon"],
        "hidden_act": _ACTIVATIONS.get(traits["activation"], "gelu"),
    }
    if kind in ("dinov2", "dinov2_with_registers"):
        values |= {"mlp_ratio": _ratio(traits, gated), "use_swiglu_ffn": gated, "qkv_bias": traits["qkv_bias"]}
    else:
        values["intermediate_size"] = traits["mlp"]
    if kind in ("dinov2_with_registers", "dinov3_vit"):
        values["num_register_tokens"] = traits["registers"]
    if kind == "vit":
        values["qkv_bias"] = traits["qkv_bias"]
    if kind == "siglip":
        values["vision_use_head"] = traits["pool"] == "map"
    if kind == "clip" and traits["output_projection"]:
        values["projection_dim"] = traits["output_projection"]
    if kind == "dinov3_vit":
        values |= {
            "use_gated_mlp": gated,
            "hidden_act": "silu" if gated else values["hidden_act"],
            "query_bias": traits["qkv_bias"],
            "key_bias": subject.has_key_biases(),
            "value_bias": traits["qkv_bias"],
            "proj_bias": traits["projection_bias"],
            "mlp_bias": True,
            "rope_theta": traits["rope_base"],
            "pos_embed_rescale": None,  # of training
        }
    return values


def _ratio(traits: Traits, gated: bool) -> int:
    """Returns Dinov2's `mlp_ratio`, a whole number; of a gated MLP, that of which two thirds are the hidden units."""
    return round(traits["mlp"] / traits["width"] * (1.5 if gated else 1))


def _markers(kind: str, traits: Traits) -> list[str]:
    """Returns names that tell which way of naming is meant: the older one, which transformers writes itself."""
    if kind in ("siglip", "clip"):
        return ["embeddings.patch_embedding.weight"]
    if kind == "dinov3_vit":
        return ["embeddings.cls_token", "layer.0.norm1.weight"]
    names = ["embeddings.cls_token", "encoder.layer.0.attention.attention.query.weight"]
    return names + (["encoder.layer.0.mlp.weights_in.weight"] if traits["activation"] == "swiglu" else [])


def _unused(kind: str, width: int, has_head: bool) -> dict[str, Shape]:
    """Returns the tensors that a class has and does not use: a token that hides patches, CLIP's last norm."""
    if kind == "dinov3_vit":
        return {"embeddings.mask_token": (1, 1, width)}
    if kind.startswith("dinov2"):
        return {"embeddings.mask_token": (1, width)}
    return {f"post_layernorm.{part}": (width,) for part in ("weight", "bias")} if kind == "clip" and has_head else {}


def _side(sides: tuple[int, int]) -> Any:
    return sides[0] if sides[0] == sides[1] else list(sides)
