"""The models that a visit times, as configs: bf16, AdamW, 1,000 classes, on one device.

Blocks are unrolled unless asked otherwise: on a GPU a compiled loop over stacked blocks is planned to take half as long
again, or more, and nearly twice the memory.
"""

import dataclasses

from step import settings_for

from vit_dist import config


def settings(variant: str, batch: int, image: int = 224, scan: bool = False) -> config.Config:
    """The config of a variant such as "B/16" at `image` pixels."""
    base = settings_for(variant, batch, "bfloat16")
    model = dataclasses.replace(base.model, image_size=image, scan=scan)
    return dataclasses.replace(base, mesh=config.Mesh(data=1), model=model)
