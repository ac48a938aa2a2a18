"""Reads the values of a file that describes published weights. Nothing is guessed: what a file does not say, or says in
a way that we cannot do, is an error that names the key of ours to set.
"""

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

from vit_dist.schema import ConfigError, build


@dataclasses.dataclass(frozen=True)
class Said:
    """The values of a file; errors name the file, the value and the key to set instead.

    Attributes:
      values: by the file's names.
      source: the file, for errors.
      given: the keys that the user has set, such as `model.activation`; what the file says of them is not read.
    """

    values: Mapping[str, Any]
    source: str
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise ConfigError(f"{self.source}: expected names and values, found {self.values!r:.40}")

    def stated(self, name: str, key: str) -> Any:
        """Returns a value of any type but null."""
        if self.values.get(name) is None:
            raise ConfigError(f"{self.source}: does not say {name}; set {key}")
        return self.values[name]

    def read(self, name: str, hint: Any, key: str) -> Any:
        """Returns a value as the type `hint`."""
        if key in self.given:
            return self.given[key]
        value = self.stated(name, key)
        try:
            return build(hint, value, name)
        except ConfigError as error:
            # What the file holds may be long, or meant for a terminal.
            problem = textwrap.shorten("".join(filter(str.isprintable, str(error))), 200, placeholder=" ...")
            raise ConfigError(f"{self.source}: {problem}; set {key}") from None

    def choice(self, name: str, options: Mapping[Any, str], key: str) -> str:
        """Returns the option that a value stands for."""
        if key in self.given:
            return self.given[key]
        value = self.read(name, type(next(iter(options))), key)
        if value not in options:
            raise self.refusal(name, "one of " + ", ".join(map(str, options)), key)
        return options[value]

    def flag(self, name: str, unless_said: bool, key: str) -> bool:
        """Returns a value that is true or false."""
        if self.values.get(name) is None and key not in self.given:
            return unless_said
        return self.read(name, bool, key)

    def refusal(self, name: str, expected: str, key: str) -> ConfigError:
        """Returns the error for a value that cannot be done."""
        return ConfigError(f"{self.source}: {name} is {self.values.get(name)!r:.60}, expected {expected}; set {key}")
