"""Train, evaluate and use Vision Transformers on any device mesh: `from vit_dist import ViT, train, evaluate, predict`.

Names are imported when they are asked for: the data loader's worker processes import this package and must not start
jax. `train`, `evaluate`, `plan` and others are modules too, and `vit_dist.train` is always the function; what is in the
package `plan` is had by `from vit_dist.plan import targets`.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_dist.bench import bench as bench
    from vit_dist.data.prepare.convert import prepare as prepare
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
    "prepare": "data.prepare.convert",
}  # of the names that their module does not share


class _Package(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule ends by setting it on the package, where it would hide the function of its name.
        if name not in __all__:
            super().__setattr__(name, value)
        elif hasattr(value, name):  # `plan` is a package, and holds its function further down
            super().__setattr__(name, getattr(value, name))


sys.modules[__name__].__class__ = _Package
