"""Opens the tensors of one tree of a saved step, such as its parameters, in the layout that Orbax writes (tensorstore).

Orbax's own reading hides which tensor cannot be read behind the names of its handlers, and in a job of several
processes those that can read would wait for the one that cannot.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorstore

from vit_dist.config import ConfigError
from vit_dist.weights.stored_tensor import printed

# Beginnings of errors that say nothing of the data.
_NOT_DAMAGE = re.compile(
    "ABORTED|CANCELLED|DEADLINE_EXCEEDED|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE"
)
_FACTS = re.compile(r" \[(?:tensorstore_spec|os_error_code)")  # after the message
_CACHE = 1 << 27  # bytes, of the index of a tree
_OF_DAMAGE = (ValueError, KeyError, IndexError, TypeError, OverflowError)  # what tensorstore raises for it


class Unreadable(ConfigError):
    """A tensor that is not what was written; `reason` says why, `missing` that a file of it is not there."""

    def __init__(self, where: object, error: Exception):
        self.reason = short_reason(error)
        self.missing = "NOT_FOUND" in str(error)
        super().__init__(f"{where}: cannot be read ({self.reason})")


def short_reason(error: Exception) -> str:
    """Returns what went wrong, in one line: the last clause of tensorstore's message, which names the layers before."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printed(_FACTS.split(text)[0].rpartition('": ')[2])


class SavedTree:
    """The tensors below the folder of a tree. Reading raises `Unreadable`, or `ConfigError` for a disk that fails."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._opened = dict[str, Any]()
        self._context = tensorstore.Context({"cache_pool#index": {"total_bytes_limit": _CACHE}})

    def names(self) -> list[str]:
        """Returns the names of the tensors, such as `head.kernel`; that of a tree that is one tensor is empty."""
        stored = self._run(self.folder, lambda: self._index("").list().result())
        ends = [key.decode(errors="replace") for key in stored]
        return [key.removesuffix("zarr.json").removesuffix("/") for key in ends if key.endswith("zarr.json")]

    def open(self, name: str) -> Any:
        """Returns tensorstore's handle of a tensor, which has `shape` and `dtype`, and which `read` reads."""
        if name not in self._opened:
            spec = {"driver": "zarr3", "kvstore": self._spec(name), "fill_missing_data_reads": False}
            options: dict[str, Any] = {"open": True, "read": True, "context": self._context}
            self._opened[name] = self._run(name, lambda: tensorstore.open(spec, **options).result())
        return self._opened[name]

    def read(self, name: str, index: tuple[Any, ...] = ()) -> Any:
        """Returns the slice of a tensor at an index as a numpy array; all of it for `()`."""
        return self._run(name, lambda: self.open(name)[index].read().result())

    def _index(self, name: str) -> Any:
        return tensorstore.KvStore.open(self._spec(name), context=self._context).result()

    def _spec(self, name: str) -> dict[str, Any]:
        base = {"driver": "file", "path": f"{self.folder}/"}
        return {"driver": "ocdbt", "base": base, "path": name and f"{name}/", "cache_pool": "cache_pool#index"}

    def _run(self, where: object, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except ConfigError:
            raise
        except _OF_DAMAGE as error:
            if _NOT_DAMAGE.match(str(error)):
                raise ConfigError(f"{self.folder}: the disk cannot be read ({printed(error)})") from error
            raise Unreadable(where, error) from error
