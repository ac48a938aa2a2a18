"""What a family tells of a file of weights."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from vit_dist.weights.naming import Naming


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
