"""Finds the weights that a user names: a folder, a file, or a name on the Hugging Face hub.

Weights come with JSON files that describe them. These are read where they lie beside the weights, and nothing here
knows what they mean.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.data.files import first_line
from vit_dist.data.libraries import Library, load
from vit_dist.paths import expanded
from vit_dist.weights.json_files import read_json
from vit_dist.weights.safetensors_files import INDEX_SUFFIX, check_inside
from vit_dist.weights.stored_tensor import StoredTensor, printed, reason, unreadable
from vit_dist.weights.tensors import open_files

_CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json")
_NAMES = ("model.safetensors", f"model{INDEX_SUFFIX}")  # the first of them in a folder is taken, whatever else is there
_EXPECTED = f"{_NAMES[0]} with its config.json, {_NAMES[1]} with its shards, one .safetensors or one .npz"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_HUB_EXAMPLE = "timm/vit_base_patch16_224.augreg_in21k"
_TORCH = (
    "import torch; from safetensors.torch import save_file; "
    "w = torch.load({old!r}, map_location='cpu', weights_only=True); w = w.get('state_dict', w.get('model', w)); "
    "save_file({{k: v.clone().contiguous() for k, v in w.items() if torch.is_tensor(v)}}, {new!r})"
)
# By suffix: a line of Python that makes a .safetensors of such a file, which is not read: most can run code when they
# are, and all need a library that is not installed.
_CONVERSIONS = {
    **dict.fromkeys((".bin", ".pth", ".pt", ".ckpt"), _TORCH),
    ".h5": (
        "import h5py; from safetensors.numpy import save_file; w = {{}}; h5py.File({old!r}).visititems("
        "lambda k, v: w.update({{k: v[()]}}) if isinstance(v, h5py.Dataset) else None); save_file(w, {new!r})"
    ),
    ".msgpack": (
        "from flax import serialization, traverse_util; from safetensors.numpy import save_file; "
        "w = serialization.msgpack_restore(open({old!r}, 'rb').read()); "
        "save_file(traverse_util.flatten_dict(w, sep='/'), {new!r})"
    ),
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Weights and what describes them.

    Attributes:
      tensors: every tensor, by its name in the file.
      configs: the JSON objects beside the weights, by the name of their file; the values are not checked.
      files: the files that tensors and configs come from.
      given: keys of ours that the user has set, such as `model.activation`; what the configs say of them is not read.
    """

    tensors: Mapping[str, StoredTensor]
    configs: Mapping[str, dict[str, Any]]
    files: tuple[Path, ...]
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any] | None:
        """The object in `config.json`, or None if there is no such file."""
        return self.configs.get("config.json")

    @property
    def folder(self) -> Path:
        """Where the weights lie."""
        return self.files[0].parent

    def digest(self) -> str:
        """Reads all files and returns the SHA-256 of what `sha256sum` prints for them, in the order of their names."""
        lines = []
        for file in sorted(self.files, key=lambda file: file.name):
            try:
                with open(file, "rb") as stream:
                    lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {file.name}\n")
            except OSError as error:
                raise unreadable(file, error) from error
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_origin(name: str | Path, key: str = "init.weights") -> Origin:
    """Returns the weights that `name` names.

    Args:
      name: a folder; a file; or `OWNER/NAME` on the Hugging Face hub, if there is no such path. What the hub's cache
        does not hold is downloaded.
      key: what the user set to `name`, for errors.

    Raises:
      ConfigError: there are no such weights, or they cannot be read.
    """
    if not str(name):
        raise ConfigError(f"{key}: is empty; name a folder, a file or weights on the Hugging Face hub ({_HUB_EXAMPLE})")
    path = expanded(name, key)
    try:
        if not path.exists():
            path = _fetch(str(name), key)
        weights = _choose(path) if path.is_dir() else path
    except OSError as error:
        raise ConfigError(f"{key}: {printed(name)} cannot be opened ({reason(error)}); check the path") from error
    if weights.suffix in _CONVERSIONS:
        raise _not_read(weights)
    tensors, files = open_files(weights)
    configs = [weights.parent / config for config in _CONFIGS if os.path.lexists(weights.parent / config)]
    for config in configs:
        check_inside(config, weights.parent)
    return Origin(tensors, {file.name: read_json(file) for file in configs}, (*files, *configs))


def _choose(folder: Path) -> Path:
    """Returns the file of weights in a folder."""
    names = sorted(entry.name for entry in folder.iterdir())
    chosen = next(([name] for name in _NAMES if name in names), [])
    for suffix in (INDEX_SUFFIX, ".safetensors", ".npz", *_CONVERSIONS):
        chosen = chosen or [name for name in names if name.endswith(suffix)]
    if not chosen:
        found = printed(", ".join(names[:8])) if names else "an empty folder"
        raise ConfigError(f"{folder}: holds no weights; expected {_EXPECTED}, found {found}")
    weights = folder / chosen[0]
    if weights.suffix not in _CONVERSIONS:
        if len(chosen) > 1:
            raise ConfigError(
                f"{folder}: holds {printed(', '.join(chosen))}; name one of these files, or fetch the index of shards "
                f"({_NAMES[1]}), too"
            )
        check_inside(weights, folder)
    return weights


def _not_read(file: Path) -> ConfigError:
    line = _CONVERSIONS[file.suffix].format(old=str(file), new=str(file.with_name(_NAMES[0])))
    return ConfigError(f"{file}: {file.suffix} is not read; where its library is installed, run this Python: {line}")


def _fetch(name: str, key: str) -> Path:
    """Returns the folder of the hub's cache that holds the weights `OWNER/NAME`, once they are downloaded."""
    missing = f"{key}: there is no file or folder {printed(name)}"
    if not _HUB_NAME.fullmatch(name) or Path(name).suffix in (".safetensors", ".npz", *_CONVERSIONS):
        hub = f"a name on the Hugging Face hub ({_HUB_EXAMPLE})"
        raise ConfigError(f"{missing}; expected a file, or a folder with {_EXPECTED}; or {hub}")
    use, remedy = f"{missing}; as a name on the Hugging Face hub it", "pip install 'vit-dist[hub]'"
    load(Library("huggingface_hub", "huggingface_hub", use, remedy))
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_NAMES, "model-*-of-*.safetensors", *_CONFIGS]))
        if not any((folder / weights).exists() for weights in _NAMES):
            folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.npz", *_CONFIGS]))
    except (OSError, ValueError, errors.HTTPError) as error:
        raise ConfigError(
            f"{missing}, and the Hugging Face hub has none that can be fetched ({printed(first_line(error))}); check "
            "the name, the network and your access to it"
        ) from error
    if not any(file.suffix in (".safetensors", ".npz") for file in folder.glob("*")):
        raise ConfigError(
            f"{key}: {name} on the Hugging Face hub has no .safetensors and no .npz; download what it has and give the "
            "path of that file, to see how it is converted"
        )
    return folder
