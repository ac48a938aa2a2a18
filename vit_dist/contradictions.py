"""Which keys of a config contradict each other."""

import dataclasses
from typing import Any

from vit_dist.schema import ConfigError, flatten, nearest_multiples


def check(config: Any) -> None:
    """Raises `ConfigError` for values of a `config.Config` that do not go together; opens no data and no devices."""
    if config.total_steps is None and config.total_epochs is None:
        raise ConfigError("total_steps: neither it nor total_epochs is set; set one")
    flat = flatten(dataclasses.asdict(config))
    for key in ("data.crop_area", "data.crop_aspect"):
        if flat[key] is not None and flat[key][0] > flat[key][1]:
            raise ConfigError(f"{key}: runs from {flat[key][0]:g} down to {flat[key][1]:g}; write the smaller first")
    for key in ("data.mean", "data.std"):
        if isinstance(flat[key], tuple) and len(flat[key]) != config.model.channels:
            raise ConfigError(
                f"{key}: has {len(flat[key])} numbers, but model.channels is {config.model.channels}; "
                "give one per channel, or a single number for all"
            )
    if config.binarize_targets and config.loss != "sigmoid":
        raise ConfigError(
            f"binarize_targets: needs loss=sigmoid, found {config.loss}; set loss=sigmoid or binarize_targets=false"
        )
    model = config.model
    if model.attention == "cudnn" and (model.dtype != "bfloat16" or model.attention_dropout):
        raise ConfigError(
            f"model.attention: cudnn takes dtype=bfloat16 and attention_dropout=0, found {model.dtype} and "
            f"{model.attention_dropout:g}; change these or set model.attention=auto"
        )
    if not config.lora.rank and config.lora != type(config.lora)():
        raise ConfigError("lora.rank: 0, so there are no adapters, but another key of lora is set; set lora.rank")
    if config.batch_size % config.accumulate_steps:
        raise ConfigError(
            f"batch_size: {config.batch_size} does not divide into accumulate_steps={config.accumulate_steps} "
            f"micro-batches; take {nearest_multiples(config.batch_size, config.accumulate_steps)}"
        )
