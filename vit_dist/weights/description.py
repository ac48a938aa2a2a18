"""What a family tells of a file of weights, and what it would write of a model of ours."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from vit_dist import config
from vit_dist.weights.naming import Naming, Shape


@dataclasses.dataclass(frozen=True)
class Description:
    """A model, and what its parameters are called.

    Attributes:
      family: its name for people.
      model: keys of `config.Model` without `model.`, all that the file or the family says.
      naming: what our parameters are made of, but for the tokens below.
      preprocessing: returns the keys that prepare images, such as `data.mean`, apart from those that are given; raises
        `ConfigError` where the source does not say one.
      position: the name of the learned positions; None: there are none.
      cls: that of the class token; None: there is none.
      registers: those of other special tokens, in their order.
      classes: the names of the classes, if they are told.
    """

    family: str
    model: Mapping[str, Any]
    naming: Naming
    preprocessing: Callable[[Collection[str]], dict[str, Any]]
    position: str | None = None
    cls: str | None = None
    registers: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to write.

    Attributes:
      model: what it is.
      data: how its images are prepared.
      parameters: by path, float32, the blocks one by one.
      classes: the names of its classes, or nothing where they have none.
      license: of the weights, if it is known.
    """

    model: config.Model
    data: config.Data
    parameters: Mapping[str, np.ndarray]
    classes: tuple[str, ...] = ()
    license: str | None = None

    def has_key_biases(self) -> bool:
        """Returns whether the bias of any key is not zero: some formats have none."""
        biases = (array for path, array in self.parameters.items() if path.endswith("attention/qkv/bias"))
        return any(bias[1].any() for bias in biases)


@dataclasses.dataclass(frozen=True)
class Draft:
    """The files that a family would write of a model, but for the numbers.

    Attributes:
      description: what the family's own reader makes of them.
      configs: JSON objects by the name of their file.
      weights_file: the name of the file of tensors.
      before: how many positions its tensor of positions has before those of the patches.
      unused: the shapes of tensors that the library expects and does not use; they are zeros.
    """

    description: Description
    configs: Mapping[str, dict[str, Any]]
    weights_file: str = "model.safetensors"
    before: int = 0
    unused: Mapping[str, Shape] = dataclasses.field(default_factory=dict)
