"""The libraries that only some data need, each imported when it is first used.

A training step, a plan and sets in memory do without them, and so do all modules on the way there: a module takes such
a library from here (`from vit_dist.data.libraries import cv2`) and uses it as if it had imported it. The first look at
one of its attributes imports the library, or raises a `ConfigError` that names what to install. From then on the object
is a plain module with the library's own attributes, so that a call costs what it costs without this.
"""

import importlib
import importlib.util
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_dist.config import ConfigError

_lock = threading.RLock()  # of all first uses; an import may itself be the first use of another library


class Library(types.ModuleType):
    """A module that is imported when one of its attributes is first looked at."""

    def __init__(
        self,
        name: str,
        package: str,
        use: str,
        remedy: str | None = None,
        then: Callable[[types.ModuleType], object] | None = None,
    ) -> None:
        """Imports nothing yet.

        Args:
          name: of the module.
          package: what is installed to have it.
          use: what needs it, for the error: "data.source=parquet".
          remedy: what to do where it is missing; None: install the package.
          then: what to do with the module after its import, before anything else is done with it.
        """
        super().__init__(name)
        self._missing = package, use, remedy or f"pip install {package}"
        self._then = then

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # somebody looks at the object, such as a debugger
            raise AttributeError(f"module {self.__name__!r} has not been used, and has no {attribute!r} yet")
        load(self)
        return getattr(self, attribute)


def load(library: Any) -> None:
    """Imports a `Library` now, if nothing has used it yet: for an error that should come early.

    May be called by many threads at once. Raises `ConfigError` where it is not installed.
    """
    with _lock:
        if not isinstance(library, Library):  # it has become a plain module
            return
        try:
            module = importlib.import_module(library.__name__)
        except ImportError as error:
            raise _missing(library, error) from error
        if library._then is not None:
            library._then(module)
        vars(library).update(vars(module))
        library.__class__ = types.ModuleType  # type: ignore[assignment]


def folder(library: Any) -> Path:
    """The folder of a library, which is not imported for it. Raises `ConfigError` where it is not installed."""
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
    what = "is not installed" if absent else "cannot be imported"
    return ConfigError(f"{use} needs {package}, which {what} ({error}); {remedy}")


def _of_parquet(name: str) -> Library:
    return Library(name, "pyarrow", "data.source=parquet")


def _of_tfds(name: str) -> Library:
    return Library(name, "tensorflow-datasets", "data.source=tfds", "pip install 'vit-dist[tfds]'")


if TYPE_CHECKING:
    import cv2 as cv2
else:
    # Batches are prepared side by side; threads within a resize would only get in their way.
    cv2 = Library(
        "cv2",
        "opencv-python-headless",
        "resizing or augmenting images on the host",
        then=lambda module: module.setNumThreads(1),
    )

simplejpeg: Any = Library("simplejpeg", "simplejpeg", "reading or writing JPEG files")
nvimgcodec: Any = Library(
    "nvidia.nvimgcodec",
    "nvidia-nvimgcodec-cu13",
    "data.crop_decode",
    "pip install 'vit-dist[crop-decode]', or set it to False",
)
sklearn: Any = Library("sklearn", "scikit-learn", "data.source=digits")
pyarrow: Any = _of_parquet("pyarrow")
pyarrow_compute: Any = _of_parquet("pyarrow.compute")
pyarrow_parquet: Any = _of_parquet("pyarrow.parquet")
tfds: Any = _of_tfds("tensorflow_datasets")
tfds_core: Any = _of_tfds("tensorflow_datasets.core")
tfds_proto: Any = _of_tfds("tensorflow_datasets.proto")
