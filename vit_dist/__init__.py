"""Train, evaluate and use Vision Transformers on any device mesh: `from vit_dist import ViT, train, evaluate, predict`.

Names are imported when they are asked for: the data loader's worker processes import this package and must not start
jax. `train`, `evaluate` and others are modules too, and `vit_dist.train` is always the function.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_dist.bench import bench as bench
    from vit_dist.data.prepare import prepare as prepare
    from vit_dist.describe import inspect as inspect
    from vit_dist.evaluate import evaluate as evaluate
    from vit_dist.model.vit import ViT as ViT
    from vit_dist.plan.verb import plan as plan
    from vit_dist.predict import predict as predict
    from vit_dist.train import train as train

__version__ = "0.1.0"
__all__ = ["ViT", "bench", "evaluate", "inspect", "plan", "predict", "prepare", "train"]
_MODULES = {
    "ViT": "model.vit",
    "inspect": "describe",
    "plan": "plan.verb",
    "prepare": "data.prepare",
}  # of the names that their module does not share


class _Package(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule ends by setting it on the package, where it would hide the function of its name.
        super().__setattr__(name, getattr(value, name) if name in __all__ else value)


sys.modules[__name__].__class__ = _Package
