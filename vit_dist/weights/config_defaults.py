"""What the configs of transformers and OpenCLIP imply where they say nothing, as those libraries answered."""

import functools
import importlib.resources
import json
from typing import Any


@functools.cache
def config_defaults(library: str) -> dict[str, Any]:
    """Returns defaults of "transformers", by `model_type`, or of "open_clip"; see `benchmarks/peers/defaults.py`."""
    return json.loads(importlib.resources.files("vit_dist.weights").joinpath("config_defaults.json").read_text())[
        library
    ]
