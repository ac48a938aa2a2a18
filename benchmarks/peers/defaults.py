"""Asks transformers and OpenCLIP what their configs imply where they say nothing.

    PYTHONPATH=benchmarks .cache/peers/bin/python -m peers.defaults

Both libraries leave out values that are the defaults of a config's class: the `vision_config` of a published SigLIP may
hold its `model_type` alone. `vit_dist/weights/config_defaults.json` has those defaults, with the versions:

- `transformers`: for each `model_type` what its own class adds to all configs. Values for training are left out.
- `open_clip`: those of `vision_cfg`, with `norm_epsilon` and `activation` read off a visual tower.
"""

import dataclasses
from typing import Any

import open_clip
import transformers
from open_clip.model import CLIPVisionCfg
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peers.architectures import ROOT, write
from peers.inspected import activation, norm

FILE = ROOT / "vit_dist/weights/config_defaults.json"
MODEL_TYPES = (
    "vit deit dinov2 dinov2_with_registers dinov3_vit siglip_vision_model siglip2_vision_model clip_vision_model"
).split()
TRAINING = (
    "dropout",
    "drop_",
    "init",
    "encoder_stride",
    "out_features",
    "out_indices",
    "stage_names",
    "reshape_hidden",
)


def of_transformers(model_type: str) -> dict[str, Any]:
    """Returns the defaults of a config that all configs do not have, and that do not follow from its other values."""
    cls = CONFIG_MAPPING[model_type]
    values, other, common = cls().to_dict(), cls(hidden_size=96).to_dict(), PreTrainedConfig().to_dict()
    own = {key: value for key, value in values.items() if key not in common and key != "model_type"}
    fixed = {key: value for key, value in own.items() if key == "hidden_size" or other[key] == value}
    return {key: value for key, value in fixed.items() if not any(word in key for word in TRAINING)}


def of_open_clip() -> dict[str, Any]:
    """Returns the defaults of the visual tower's config, and what they imply."""
    config = CLIPVisionCfg()
    text = {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    tower: Any = open_clip.CLIP(embed_dim=16, vision_cfg={"layers": 1, "width": 64}, text_cfg=text).visual
    block = tower.transformer.resblocks[0]
    kind, epsilon = norm(type(block.ln_1)(8))
    return dataclasses.asdict(config) | {
        "norm": kind,
        "norm_epsilon": epsilon,
        "activation": activation(block.mlp.gelu),
    }


def main() -> None:
    versions = {"transformers": transformers.__version__, "open_clip": open_clip.__version__}
    asked = {"transformers": {name: of_transformers(name) for name in MODEL_TYPES}, "open_clip": of_open_clip()}
    write(FILE, {"versions": versions, **asked})


if __name__ == "__main__":
    main()
