"""Opens `.safetensors` files, one or several with an index.

The `safetensors` library checks a file: its header's syntax, that shapes agree with sizes, and that the tensors fill
the file without gap or overlap. The slices are read by our own mapping: the library keeps its mapping, and with it all
pages that were ever read, as long as a file is open; it takes neither negative nor empty slices, and no 8-bit floats.
"""

import functools
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from vit_dist.config import ConfigError
from vit_dist.data.files import open_stream
from vit_dist.weights.json_files import LARGEST, parse_json, read_json
from vit_dist.weights.stored_tensor import FETCH_AGAIN, StoredTensor, map_array, printed, reason, unreadable

INDEX_SUFFIX = ".safetensors.index.json"
# Numbers are little-endian. Left out are floats of 4 and 6 bits, which do not fill bytes.
_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8", "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip


def open_safetensors(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a `.safetensors` file by name. Raises `ConfigError` if it is damaged."""
    try:
        with open_stream(file) as stream:
            prefix = stream.read(8)
            if prefix == b"version ":
                raise ConfigError(f"{file}: is a pointer of Git LFS, not the weights; run `git lfs pull` in its folder")
            size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if size > LARGEST:  # the library would take 100 MB
                raise ConfigError(
                    f"{file}: its header claims {size} bytes, more than {LARGEST >> 20} MiB, so it is no safetensors "
                    f"file or damaged; {FETCH_AGAIN}"
                )
            header = stream.read(size)
        with safe_open(file, "numpy"):
            pass
    except OSError as error:
        raise unreadable(file, error) from error
    except SafetensorError as error:
        problem = reason(error).removeprefix("Error while deserializing header: ")
        raise ConfigError(f"{file}: is no complete safetensors file ({problem}); {FETCH_AGAIN}") from error
    tensors = {}
    for name, entry in parse_json(header, f"{file}: its header").items():
        if name == "__metadata__":
            continue
        # the library takes a list for an object, too, and an object with one key for a text
        if not isinstance(entry, dict) or not isinstance(entry["dtype"], str):
            raise ConfigError(f"{file}: tensor '{printed(name)}' has no dtype, shape and data_offsets; {FETCH_AGAIN}")
        if entry["dtype"] not in _DTYPES:
            raise ConfigError(
                f"{file}: tensor '{printed(name)}' is of {entry['dtype']}, which is not read; save it as F32 or BF16"
            )
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        load = functools.partial(map_array, file, 8 + size + entry["data_offsets"][0], shape, dtype)
        tensors[name] = StoredTensor(name, shape, dtype, file, load)
    return tensors


def open_sharded(index: Path) -> tuple[dict[str, StoredTensor], list[Path]]:
    """Returns the tensors of all shards that `*.safetensors.index.json` names, and the shards.

    Raises `ConfigError` if a shard is missing or damaged or lies outside the index's folder, or if the shards do not
    hold exactly the tensors that the index says each of them holds.
    """
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(name, str) for name in shard_of.values()):
        raise ConfigError(f"{index}: expected 'weight_map', tensor names with their files' names; {FETCH_AGAIN}")
    tensors: dict[str, StoredTensor] = {}
    shards = [_shard(index, name) for name in sorted(set(shard_of.values()))]
    for shard in shards:
        for name, tensor in open_safetensors(shard).items():
            if shard_of.get(name) != shard.name:
                expected = f"in {printed(shard_of[name])}" if name in shard_of else "nowhere"
                raise ConfigError(
                    f"{shard}: holds tensor {name!r}, which is {expected} by {index.name}; fetch index and shards again"
                )
            tensors[name] = tensor
    for name in shard_of:
        if name not in tensors:
            raise ConfigError(
                f"{index}: tensor '{printed(name)}' is not in {shard_of[name]}; fetch index and shards again"
            )
    return tensors, shards


def _shard(index: Path, name: str) -> Path:
    if not name.endswith(".safetensors") or "/" in name or "\\" in name or not name.isprintable():
        raise ConfigError(
            f"{index}: names the shard '{printed(name)}', expected a .safetensors file beside it; {FETCH_AGAIN}"
        )
    shard = index.parent / name
    if not shard.is_file():
        raise ConfigError(f"{index}: names the shard {printed(name)}, which is not beside it; fetch that file, too")
    check_inside(shard, index.parent)
    return shard


def check_inside(file: Path, folder: Path) -> None:
    """Raises `ConfigError` if `file`, an entry of `folder`, is a link to a file outside of the folder.

    The Hugging Face hub's cache links from `snapshots/<commit>` to `blobs` beside `snapshots`: this counts as inside.
    """
    inside = Path(os.path.realpath(folder))
    blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
    target = Path(os.path.realpath(file))
    if not (target.is_relative_to(inside) or target.is_relative_to(blobs)):
        raise ConfigError(f"{file}: is a link to {printed(target)}, outside of its folder; copy that file here instead")
