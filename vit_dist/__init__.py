"""Trains, evaluates and uses Vision Transformers on any device mesh.

    from vit_dist import train, evaluate, predict
    train("digits", "runs/digits", {"batch_size": 64})
    evaluate("runs/digits")
    predict("runs/digits", ["one.png"])

train        a recipe, its name or a config -> a run in a working directory; returns its summary
evaluate     a run -> exact accuracy and loss of a split
predict      a run and image files -> their classes with probabilities
plan         a config and hardware that is not here -> memory, time, layout
bench        a config -> images a second on the devices that are here
inspect      a config -> its parameters, their layout and size
prepare      a data set -> sharded records that are quick to read
load_config  a recipe and what is to differ -> the config that these take
ViT          the model, a Flax NNX module

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
    from vit_dist.recipes import load_config as load_config
    from vit_dist.train import train as train

__version__ = "0.1.0"
__all__ = ["ViT", "bench", "evaluate", "inspect", "load_config", "plan", "predict", "prepare", "train"]
_MODULES = {
    "ViT": "model.vit",
    "inspect": "describe",
    "load_config": "recipes",
    "plan": "plan.verb",
    "prepare": "data.prepare.convert",
}  # of the names that their module does not share


class _Package(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}"), name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule ends by setting it on the package, where it would hide the function of its name.
        if name not in __all__:
            super().__setattr__(name, value)
        elif hasattr(value, name):  # `plan` is a package, and holds its function further down
            super().__setattr__(name, getattr(value, name))


sys.modules[__name__].__class__ = _Package
