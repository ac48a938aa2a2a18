"""OpenCLIP's visual tower beside its text tower, small."""

import functools
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import open_clip
import torch
from open_clip.push_to_hf_hub import save_for_hf
from torch import nn

from peers.case import Case, Outputs

VISION = {"layers": 3, "width": 64, "head_width": 16, "mlp_ratio": 2, "patch_size": 16, "image_size": 48}
TEXT = {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
CASES: dict[str, dict[str, Any]] = {
    "open_clip_gelu": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
    "open_clip_quick_gelu": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True},
}


class NoTokenizer:
    """Stands for the tokenizer, which images do not need."""

    def save_pretrained(self, folder: pathlib.Path) -> None:
        """Writes nothing."""


def golden() -> Iterator[Case]:
    """Yields the two activations."""
    for name, config in CASES.items():
        yield Case(
            name,
            f"open_clip {open_clip.__version__}",
            (48, 48, 3),
            functools.partial(save, config),
            load,
            outputs,
            branch=0.5,
            config="open_clip_config.json",
            weights="open_clip_model.safetensors",
        )


def save(config: dict[str, Any], folder: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory() as configs:
        file = pathlib.Path(configs) / "vit-small-of-ours.json"
        file.write_text(json.dumps(config))
        open_clip.add_model_config(file)
        model = open_clip.create_model(file.stem)
    save_for_hf(model, NoTokenizer(), config, str(folder), safe_serialization=True)


def load(folder: pathlib.Path) -> nn.Module:
    return open_clip.create_model(f"local-dir:{folder}")


def outputs(model: nn.Module, images: torch.Tensor) -> Outputs:
    return {"features": model.encode_image(images)}
