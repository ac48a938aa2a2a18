"""Trains, evaluates and uses Vision Transformers on any device mesh.

    from vit_dist import train, evaluate, predict
    train("digits", "runs/digits", {"batch_size": 64})
    evaluate("runs/digits")
    predict("runs/digits", ["one.png"])

train        trains a recipe or config in a working directory; returns the summary of the run
evaluate     returns exact accuracy and loss of a run on a split
load         opens a run, or weights of others, as a model to call
predict      returns the classes of image files, with probabilities
probe        returns how well features classify: neighbours, few-shot and full linear classifiers
features     writes the features of every example of a split
plan         returns memory, time and layout of a config on hardware that is not attached
bench        measures images per second of a config on the attached devices
inspect      returns the parameters of a config, their layout and size
export       writes a run, or weights of others, for other libraries
prepare      converts a data set into sharded records that are quick to read
load_config  returns a recipe with changes as the config that these functions take
ViT          the model, a Flax NNX module

A name is imported when it is first used: the worker processes of the data loader import this package and must not start
jax. `train`, `evaluate`, `plan` and others are modules too; `vit_dist.train` is always the function, and
`from vit_dist.plan import targets` reaches the modules of the package `plan`.
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
    from vit_dist.exporting.verb import export as export
    from vit_dist.features import features as features
    from vit_dist.load import load as load
    from vit_dist.model.vit import ViT as ViT
    from vit_dist.plan.verb import plan as plan
    from vit_dist.predict import predict as predict
    from vit_dist.probe import probe as probe
    from vit_dist.recipes import load_config as load_config
    from vit_dist.train import train as train

__version__ = "0.1.0"
__all__ = [
    "ViT", "bench", "evaluate", "export", "features", "inspect", "load", "load_config", "plan", "predict", "prepare",
    "probe", "train",
]  # fmt: skip
_MODULES = {
    "ViT": "model.vit",
    "export": "exporting.verb",
    "inspect": "describe",
    "load_config": "recipes",
    "plan": "plan.verb",
    "prepare": "data.prepare.convert",
}  # names that are not the names of their modules


class _Package(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}"), name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule sets it on the package, where it would hide the function of the same name.
        if name not in __all__:
            super().__setattr__(name, value)
        elif hasattr(value, name):  # not of the package `plan`, whose function is in a module of it
            super().__setattr__(name, getattr(value, name))


sys.modules[__name__].__class__ = _Package
