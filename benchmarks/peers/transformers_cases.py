"""transformers' models, small; under the names of old, which it still writes, and under those of its modules."""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from peers.case import Case, Outputs, head_input

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 16,
}
MLP = {"intermediate_size": 128}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 16,
    "max_position_embeddings": 4,
}
LABELS = {"num_labels": 10}
NORMED = {"branch": 0.5}


def classifier(model: nn.Module, images: torch.Tensor) -> Outputs:
    return head_input(model, model.classifier, lambda: model(pixel_values=images).logits)


def pooled(model: nn.Module, images: torch.Tensor) -> Outputs:
    return {"features": model(pixel_values=images).pooler_output}


def vit_pooled(model: nn.Module, images: torch.Tensor) -> Outputs:
    """Returns as features the class token; `pooler_output` follows by a dense layer and tanh."""
    output = model(pixel_values=images)
    return {"features": output.last_hidden_state[:, 0], "pooler_output": output.pooler_output}


def projected(model: nn.Module, images: torch.Tensor) -> Outputs:
    return {"features": model(pixel_values=images).image_embeds}


def image_features(model: nn.Module, images: torch.Tensor) -> Outputs:
    output = model.get_image_features(pixel_values=images)
    return {"features": getattr(output, "pooler_output", output)}


# name of the fixture: (class, config, outputs, sizes of the random weights)
CASES: dict[str, tuple[Any, Callable[[], Any], Callable, dict[str, Any]]] = {
    "hf_vit": (ViTForImageClassification, lambda: ViTConfig(**SMALL, **MLP, **LABELS), classifier, {}),
    "hf_vit_tanh": (
        ViTForImageClassification,
        lambda: ViTConfig(**SMALL, **MLP, **LABELS, hidden_act="gelu_new", layer_norm_eps=1e-6, qkv_bias=False),
        classifier,
        {},
    ),
    "hf_vit_model": (ViTModel, lambda: ViTConfig(**SMALL, **MLP), vit_pooled, {}),
    "hf_deit": (DeiTForImageClassification, lambda: DeiTConfig(**SMALL, **MLP, **LABELS), classifier, {}),
    "hf_dinov2": (Dinov2Model, lambda: Dinov2Config(**SMALL, mlp_ratio=2), pooled, {}),
    "hf_dinov2_classifier": (
        Dinov2ForImageClassification,
        lambda: Dinov2Config(**SMALL, **LABELS, mlp_ratio=2),
        classifier,
        {},
    ),
    "hf_dinov2_giant": (Dinov2Model, lambda: Dinov2Config(**SMALL, mlp_ratio=2, use_swiglu_ffn=True), pooled, {}),
    "hf_dinov2_registers": (
        Dinov2WithRegistersModel,
        lambda: Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, num_register_tokens=4),
        pooled,
        {},
    ),
    "hf_dinov2_registers_classifier": (
        Dinov2WithRegistersForImageClassification,
        lambda: Dinov2WithRegistersConfig(**SMALL, **LABELS, mlp_ratio=2, num_register_tokens=4),
        classifier,
        {},
    ),
    "hf_dinov3": (DINOv3ViTModel, lambda: DINOv3ViTConfig(**SMALL, **MLP, num_register_tokens=4), pooled, {}),
    "hf_dinov3_plus": (
        DINOv3ViTModel,
        lambda: DINOv3ViTConfig(
            **SMALL,
            **MLP,
            num_register_tokens=4,
            use_gated_mlp=True,
            hidden_act="silu",
            query_bias=False,
            value_bias=False,
        ),  # fmt: skip
        pooled,
        {},
    ),
    "hf_siglip": (SiglipVisionModel, lambda: SiglipVisionConfig(**SMALL, **MLP), pooled, {}),
    "hf_siglip_full": (
        SiglipModel,
        lambda: SiglipConfig(vision_config={**SMALL, **MLP}, text_config=TEXT),
        image_features,
        {},
    ),
    "hf_siglip_classifier": (
        SiglipForImageClassification,
        lambda: SiglipConfig(vision_config={**SMALL, **MLP, "vision_use_head": False}, text_config=TEXT, **LABELS),
        classifier,
        {},
    ),
    "hf_clip": (CLIPVisionModel, lambda: CLIPVisionConfig(**SMALL, **MLP), pooled, NORMED),
    "hf_clip_projection": (
        CLIPVisionModelWithProjection,
        lambda: CLIPVisionConfig(**SMALL, **MLP, projection_dim=24),
        projected,
        NORMED,
    ),
    "hf_clip_gelu": (
        CLIPVisionModelWithProjection,
        lambda: CLIPVisionConfig(**SMALL, **MLP, projection_dim=24, hidden_act="gelu"),
        projected,
        NORMED,
    ),
    "hf_clip_classifier": (
        CLIPForImageClassification,
        lambda: CLIPConfig(vision_config={**SMALL, **MLP}, text_config=TEXT, **LABELS),
        classifier,
        NORMED,
    ),
    "hf_clip_full": (
        CLIPModel,
        lambda: CLIPConfig(
            vision_config={**SMALL, **MLP, "projection_dim": 24},
            text_config={**TEXT, "projection_dim": 24},
            projection_dim=24,
        ),
        image_features,
        NORMED,
    ),
}


# The names of their modules are those of the case before, with the same difference from those that are written.
SAME_AGAIN = {"hf_vit_tanh", "hf_dinov2_classifier", "hf_dinov2_registers_classifier", "hf_dinov3_plus"}


def golden() -> Iterator[Case]:
    """Yields a case of each class, and one more under the names of its modules, which may be those that it writes."""
    transformers.utils.logging.disable_progress_bar()
    for name, (cls, config, outputs, sizes) in CASES.items():
        model = cls(config())
        for ending, original, short in (("", True, False), ("_new_names", False, False), ("_short_config", True, True)):
            if (not original and name in SAME_AGAIN) or (short and not name.endswith("full")):
                continue
            yield Case(
                name + ending,
                f"transformers {transformers.__version__}",
                (48, 48, 3),
                functools.partial(save, model, original, short),
                cls.from_pretrained,
                outputs,
                **sizes,
            )


def save(model: Any, original: bool, short: bool, folder: pathlib.Path) -> None:
    """Writes a model.

    Args:
      model: of transformers.
      original: whether under the names of old.
      short: whether to leave the default values out of the configs of its towers, as published files do.
      folder: for `config.json` and `model.safetensors`.
    """
    model.save_pretrained(folder, save_original_format=original)
    if short:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        for key in ("vision_config", "text_config"):
            usual = json.loads(type(getattr(model.config, key))().to_json_string(use_diff=False))
            named = {"model_type": usual.pop("model_type")}
            config[key] = named | {name: value for name, value in config[key].items() if usual.get(name) != value}
        file.write_text(json.dumps(config))
