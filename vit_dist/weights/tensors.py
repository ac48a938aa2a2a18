"""Opens a file of weights, whatever its format, as a mapping from names to tensors that are read slice by slice."""

from pathlib import Path

from vit_dist.config import ConfigError
from vit_dist.weights.npz_files import open_npz
from vit_dist.weights.safetensors_files import INDEX_SUFFIX, open_safetensors, open_sharded
from vit_dist.weights.stored_tensor import StoredTensor

FORMATS = f".safetensors, {INDEX_SUFFIX} or .npz"


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors in a `.safetensors`, a `.safetensors.index.json` with its shards, or an `.npz`, by name.

    Only names, shapes and dtypes are read. Raises `ConfigError` for a damaged file and for another kind of file.
    """
    return open_files(path)[0]


def open_files(path: Path) -> tuple[dict[str, StoredTensor], list[Path]]:
    """Returns the tensors as `open_tensors` does, and all files that they were found in: the path, and the shards."""
    if path.name.endswith(INDEX_SUFFIX):
        tensors, shards = open_sharded(path)
        return tensors, [path, *shards]
    if path.suffix == ".safetensors":
        return open_safetensors(path), [path]
    if path.suffix == ".npz":
        return open_npz(path), [path]
    raise ConfigError(f"{path}: expected a {FORMATS} file")
