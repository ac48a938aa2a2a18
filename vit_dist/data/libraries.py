"""Imports the libraries that only some data need, each when it is first used.

A training step, a plan and data sets in memory need none of them. A module takes such a library from this one (`from
vit_dist.data.libraries import cv2`) and uses it as if it had imported it. The first access to one of its attributes
imports the library, or raises a `ConfigError` that names the package to install. From then on the object is a plain
module with the library's own attributes, so later calls cost nothing more.
"""

import importlib
import importlib.util
import threading
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_dist.config import ConfigError

_lock = threading.RLock()  # held during a first use; reentrant, as an import can be the first use of another library


class Library(types.ModuleType):
    """A module that is imported at the first access to one of its attributes."""

    def __init__(self, name: str, package: str, use: str, remedy: str = "", after_import: Any = None) -> None:
        """Stores how to import the module, without importing it.

        Args:
          name: the module's name.
          package: the package that contains it.
          use: what needs the library, for the error: "data.source=parquet".
          remedy: what to do if it is missing; empty: install the package.
          after_import: a function that is called with the module right after its import, before any other use.
        """
        super().__init__(name)
        self._missing = package, use, remedy or f"pip install {package}"
        self._after_import = after_import

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # a debugger, or another tool that inspects the object, is no use of the library
            raise AttributeError(f"module {self.__name__!r} has not been used, and has no {attribute!r} yet")
        load(self)
        return getattr(self, attribute)


def load(library: Any) -> None:
    """Imports a `Library` if it has not been used yet, for an error that should come early. Safe for many threads.

    Raises `ConfigError` if it is not installed.
    """
    with _lock:
        if not isinstance(library, Library):  # it has become a plain module
            return
        try:
            module = importlib.import_module(library.__name__)
        except ImportError as error:
            raise _missing(library, error) from error
        if library._after_import:
            library._after_import(module)
        vars(library).update(vars(module))
        library.__class__ = types.ModuleType  # type: ignore[assignment]


def folder(library: Any) -> Path:
    """Returns the folder of a library without importing it. Raises `ConfigError` if it is not installed."""
    name = library.__name__
    try:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    except ImportError as error:
        raise _missing(library, error) from error
    return Path(spec.origin).parent


def _missing(library: Any, error: ImportError) -> ConfigError:
    package, use, remedy = library._missing
    top, missing = (str(name).partition(".")[0] for name in (library.__name__, error.name))
    absent = isinstance(error, ModuleNotFoundError) and missing == top
    problem = "is not installed" if absent else "cannot be imported"
    return ConfigError(f"{use} needs {package}, which {problem} ({error}); {remedy}")


if TYPE_CHECKING:
    import cv2 as cv2
else:
    # Several threads already make batches at the same time; more threads within each resize would slow them down.
    cv2 = Library(
        "cv2",
        "opencv-python-headless",
        "resizing or augmenting images on the host",
        after_import=lambda module: module.setNumThreads(1),
    )

simplejpeg: Any = Library("simplejpeg", "simplejpeg", "reading or writing JPEG files")
nvimgcodec: Any = Library(
    "nvidia.nvimgcodec",
    "nvidia-nvimgcodec-cu13",
    "data.crop_decode",
    "pip install 'vit-dist[crop-decode]', or set it to False",
)
sklearn: Any = Library("sklearn", "scikit-learn", "data.source=digits")
_PARQUET = "pyarrow", "data.source=parquet"
pyarrow: Any = Library("pyarrow", *_PARQUET)
pyarrow_compute: Any = Library("pyarrow.compute", *_PARQUET)
pyarrow_parquet: Any = Library("pyarrow.parquet", *_PARQUET)
_TFDS = "tensorflow-datasets", "data.source=tfds", "pip install 'vit-dist[tfds]'"
tfds: Any = Library("tensorflow_datasets", *_TFDS)
tfds_core: Any = Library("tensorflow_datasets.core", *_TFDS)
tfds_proto: Any = Library("tensorflow_datasets.proto", *_TFDS)
