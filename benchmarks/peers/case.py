"""What a library has to give for a comparison: a folder of weights that it wrote, and the function that it computes.

A case first lets the library write a file of its own. Its tensors are then replaced by `random_weights`, by the names
in the file, and the library reads the file again: so the library itself says what each name means.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import safetensors
import safetensors.numpy
import torch
from torch import nn

from peers import random_weights

Outputs = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of another library."""

    name: str
    library: str
    image: tuple[int, int, int]  # height, width, channels
    save: Callable[[pathlib.Path], None]  # writes weights and config into a folder
    load: Callable[[pathlib.Path], nn.Module]  # reads them
    outputs: Callable[[nn.Module, torch.Tensor], Outputs]  # of images [B, C, H, W]: `logits`, `features` or both
    embedding: float = 0.01  # as in `random_weights.weight`
    branch: float = 0.01
    config: str = "config.json"
    weights: str = "model.safetensors"


def fill(file: pathlib.Path, embedding: float, branch: float) -> dict[str, list]:
    """Replaces the tensors in a file of safetensors by random ones; returns their shapes by name."""
    with safetensors.safe_open(file, "pt") as stored:
        metadata, names = stored.metadata(), list(stored.keys())
        shapes = {name: list(stored.get_slice(name).get_shape()) for name in names}
        floats = {name for name in names if stored.get_slice(name).get_dtype() == "F32"}
        if floats != set(names):
            raise ValueError(f"{file}: not float32: {sorted(set(names) - floats)}")
    tensors = {name: random_weights.weight(name, tuple(shape), embedding, branch) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, file, metadata)
    return shapes


def head_input(model: nn.Module, head: nn.Module, run: Callable[[], torch.Tensor]) -> Outputs:
    """Returns the logits of `run`, and as features what it gave to the head."""
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = run()
    hook.remove()
    (features,) = seen
    return {"logits": logits, "features": features}
