"""timm's models, small: one of each form for the golden fixtures, and all plain ViTs for the table of `make peers`."""

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import eva, save_for_hf
from torch import nn

from peers.case import Case, Outputs

SMALL: dict[str, Any] = {"embed_dim": 64, "depth": 3, "num_heads": 4}
DINOV3 = {"img_size": 48, "num_classes": 10}
NORMED = {"branch": 0.5}  # beside tokens that a norm has made large
# name of the fixture: (architecture, arguments, sizes of the random weights)
GOLDEN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "timm_vit_cls": ("vit_base_patch16_224", {}, {}),
    "timm_vit_avg": ("eva_large_patch14_196", {}, {}),
    "timm_vit_gap": ("vit_medium_patch16_gap_240", {}, {}),
    "timm_vit_registers_with_positions": ("vit_so150m2_patch16_reg1_gap_256", {}, {}),
    "timm_vit_registers_map": ("vit_so150m_patch16_reg4_map_256", {}, {}),
    "timm_vit_qk_norm": ("vit_base_patch16_224", {"qk_norm": True}, {}),
    "timm_vit_oblong": ("vit_base_patch16_224", {"img_size": [48, 32], "patch_size": [16, 8], "in_chans": 1}, {}),
    "timm_deit3": ("deit3_small_patch16_224", {}, {}),
    "timm_deit3_old_names": ("deit3_small_patch16_224", {}, {}),
    "timm_dinov2": ("vit_small_patch14_dinov2", {}, {}),
    "timm_dinov2_reg4": ("vit_small_patch14_reg4_dinov2", {"num_classes": 10}, {}),
    "timm_dinov2_giant": ("vit_giant_patch14_reg4_dinov2", {"mlp_ratio": 4}, {}),
    "timm_dinov3": ("vit_small_patch16_dinov3_qkvb", DINOV3 | {"global_pool": "token"}, {}),
    "timm_dinov3_plus": ("vit_small_plus_patch16_dinov3", DINOV3, {}),
    "timm_siglip": ("vit_base_patch16_siglip_224", {}, {}),
    "timm_siglip_tanh": ("vit_so400m_patch16_siglip_256", {"mlp_ratio": 3, "num_classes": 10}, {}),
    "timm_siglip_gap": ("vit_base_patch16_siglip_gap_224", {}, {}),
    "timm_clip_laion": ("vit_base_patch32_clip_224", {}, NORMED),
    "timm_clip_openai": ("vit_base_patch16_clip_quickgelu_224", {}, NORMED),
    "timm_aimv2": ("aimv2_large_patch14_224", {"num_classes": 10}, NORMED),
    "timm_no_final_norm": ("vit_base_patch16_radio_v3", {}, {}),
    "timm_no_final_norm_cls": ("vit_intern300m_patch14_448", {"num_classes": 10}, {}),
    "timm_parallel_rms": ("vit_base_patch16_xp_224", {}, NORMED),
    "timm_parallel": ("vit_pwee_patch16_reg1_gap_256", {}, {}),
}


def golden() -> Iterator[Case]:
    """Yields a case of each form."""
    for name, (architecture, arguments, sizes) in GOLDEN.items():
        yield case(name, architecture, SMALL | arguments, sizes)
    yield from meta()


def meta() -> Iterator[Case]:
    """Yields DINOv3 under Meta's names, without a config; what they mean is said by timm, which reads such files."""
    for ending, architecture in (("", "vit_small_patch16_dinov3_qkvb"), ("_plus", "vit_small_plus_patch16_dinov3")):
        arguments = SMALL | {"img_size": 48, "num_classes": 0, "global_pool": "token"}
        yield Case(
            f"meta_dinov3{ending}",
            f"timm {timm.__version__}, its filter of Meta's names",
            (48, 48, 3),
            functools.partial(save_as_meta, architecture, arguments),
            functools.partial(load_of_meta, architecture, arguments),
            outputs,
            config="",
        )


META = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"} | {
    "fc1_g": "w1", "fc1_x": "w2", "fc2": "w3",
}  # fmt: skip


def save_as_meta(architecture: str, arguments: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes timm's model under Meta's names, with the further tensors of Meta's files."""
    model = timm.create_model(architecture, **arguments)
    tensors, width = {}, arguments["embed_dim"]
    gated = any("fc1_g" in name for name in model.state_dict())
    for name, tensor in model.state_dict().items():
        for ours, theirs in META.items():
            name = name.replace(ours, theirs) if gated or not theirs.startswith("w") else name
        if name.endswith("q_bias"):
            name, tensor = name.replace("q_bias", "qkv.bias"), torch.zeros(3 * width)
        if not name.endswith("v_bias"):
            tensors[name] = tensor.contiguous()
    for index in range(arguments["depth"]) if "blocks.0.attn.qkv.bias" in tensors else ():
        tensors[f"blocks.{index}.attn.qkv.bias_mask"] = torch.zeros(3 * width)
    tensors["mask_token"] = torch.zeros(1, width)
    tensors["rope_embed.periods"] = torch.zeros(width // arguments["num_heads"] // 4)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def load_of_meta(architecture: str, arguments: dict[str, Any], folder: pathlib.Path) -> nn.Module:
    model = timm.create_model(architecture, **arguments)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    model.load_state_dict(eva.checkpoint_filter_fn(tensors, model))
    return model


def every() -> Iterator[Case]:
    """Yields every representable plain ViT of timm, DeiT and DINOv3, small, with the other arguments of its name."""
    table = json.loads((pathlib.Path(__file__).parents[2] / "vit_dist/weights/timm_architectures.json").read_text())
    for rows in table["architectures"].values():
        for name, arguments in rows.items():
            if name not in table["unsupported"]:
                normed = arguments.get("pre_norm") or arguments.get("embed_norm_layer")
                # Of this width every ratio gives an even number of hidden units.
                yield case(f"all_{name}", name, SMALL | {"embed_dim": 96}, NORMED if normed else {})


def case(name: str, architecture: str, arguments: dict[str, Any], sizes: dict[str, Any]) -> Case:
    """Returns the case of an architecture with some arguments; 3 by 3 patches unless they give the size."""
    usual = timm.create_model(architecture, device="meta")
    patch = usual.patch_embed.patch_size[0]
    arguments = {"img_size": 3 * patch} | arguments
    if usual.num_classes:
        arguments = {"num_classes": 10} | arguments
    height, width = (arguments["img_size"],) * 2 if isinstance(arguments["img_size"], int) else arguments["img_size"]
    return Case(
        name,
        f"timm {timm.__version__}",
        (height, width, arguments.get("in_chans", 3)),
        functools.partial(save, architecture, arguments, name.endswith("old_names")),
        lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True),
        outputs,
        **sizes,
    )


def save(architecture: str, arguments: dict[str, Any], old_names: bool, folder: pathlib.Path) -> None:
    save_for_hf(timm.create_model(architecture, **arguments), str(folder), safe_serialization=True)
    if old_names:  # as in DeiT-III's own files; timm's filter gives them new names when it reads them
        file = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        names = {name: name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2") for name in tensors}
        safetensors.torch.save_file({names[name]: tensor for name, tensor in tensors.items()}, file)


def outputs(model: nn.Module, images: torch.Tensor) -> Outputs:
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    logits = {"logits": model(images)} if model.num_classes else {}
    return logits | {"features": features}
