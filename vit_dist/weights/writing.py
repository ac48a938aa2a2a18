"""Writes a model of ours as another library would: its files' names, tensors and configs.

A family drafts the files, and its own reader says what model they would be. Where that differs from ours, an equivalent
model takes its place, or the difference is an error: no format is ever given a model that it would compute otherwise.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.numpy

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.model.shape import shape_of
from vit_dist.weights.description import Draft, Subject
from vit_dist.weights.equivalents import EQUIVALENTS, without_patch_bias
from vit_dist.weights.families import flax_npz, own, timm, transformers_draft
from vit_dist.weights.naming import stored_tensors
from vit_dist.weights.origin import Origin
from vit_dist.weights.published import shapes_of, understood
from vit_dist.weights.stored_tensor import in_memory
from vit_dist.weights.timm_config import differing
from vit_dist.weights.tokens import stored_tokens
from vit_dist.weights.traits import full_traits_of

# By format: the family whose files these are, and its name for people.
FORMATS: dict[str, tuple[ModuleType, str]] = {
    "timm": (timm, "timm"),
    "huggingface": (transformers_draft, "transformers"),
    "safetensors": (own, "our own format"),
    "npz": (flax_npz, "big_vision and vision_transformer"),
}
_OF_TRAINING = ("rope_jitter", "rope_rescale")


@dataclasses.dataclass(frozen=True)
class Files:
    """What a folder is to hold: tensors by name, and JSON objects by the name of their file.

    Attributes:
      weights_file: the name of the file of tensors.
      tensors: float32, by name.
      configs: by the name of their file.
      written: the model that they are: ours, or an equivalent one.
    """

    weights_file: str
    tensors: Mapping[str, np.ndarray]
    configs: Mapping[str, dict[str, Any]]
    written: Subject


def files_of(subject: Subject, format: str) -> Files:
    """Returns the files of a model in a format of `FORMATS`.

    Raises:
      ConfigError: the format has no such model; names the key, or the parameter.
    """
    family, name = FORMATS[format]
    subject, draft = _expressed(subject, family, name)
    described, shape = draft.description, shape_of(subject.model)
    if described.naming.table.get("patch/bias", "") is None and subject.parameters["patch/bias"].any():
        subject = without_patch_bias(subject) or subject
    try:
        tensors = stored_tensors(described.naming, subject.parameters, (*shape.patch, shape.channels))
    except ConfigError as error:
        raise ConfigError(f"{error} ({name}); export --format=safetensors") from error
    special = described.position, described.cls, described.registers
    tensors |= stored_tokens(described.naming, special, subject.parameters, draft.before)
    tensors |= {unused: np.zeros(shape, np.float32) for unused, shape in draft.unused.items()}
    _check(subject, draft, tensors)
    return Files(draft.weights_file, tensors, draft.configs, subject)


def save(files: Files, folder: Path) -> None:
    """Writes files into a folder."""
    for file, values in files.configs.items():
        (folder / file).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tensors = {name: np.ascontiguousarray(array) for name, array in files.tensors.items()}
    if files.weights_file.endswith(".npz"):
        np.savez(folder / files.weights_file, **tensors)  # type: ignore[arg-type]
    else:
        safetensors.numpy.save_file(tensors, folder / files.weights_file, {"format": "pt"})


def _expressed(subject: Subject, family: ModuleType, name: str) -> tuple[Subject, Draft]:
    """Returns the model, or an equivalent one, that a family can express, with its draft."""
    for _ in range(len(EQUIVALENTS) + 1):
        draft = family.draft(subject)
        ours, theirs = full_traits_of(subject.model), _traits(draft)
        wrong = [key for key in differing(theirs, ours) if key not in _OF_TRAINING]
        if not wrong:
            return subject, draft
        others = (EQUIVALENTS[key](subject, theirs[key]) for key in wrong if key in EQUIVALENTS)
        other = next((one for one in others if one is not None), None)
        if other is None:
            break
        subject = other
    key = next((key for key in wrong if key not in EQUIVALENTS), wrong[0])
    raise ConfigError(
        f"model.{key}: {_text(ours[key])}, which {name} cannot express: the nearest of its models has "
        f"{_text(theirs[key])}; export --format=safetensors or stablehlo"
    )


def _traits(draft: Draft) -> dict[str, Any]:
    described = draft.description.model
    return full_traits_of(config.resolve({"total_steps": 1, "model": {**described, "scan": False}}).model)


def _check(subject: Subject, draft: Draft, tensors: Mapping[str, np.ndarray]) -> None:
    """Asserts that the family's reader finds the model and all of its tensors in the files."""
    origin = Origin(in_memory(tensors), draft.configs, (Path(draft.weights_file),))
    read = understood(origin)
    assert set(read.left_out) == set(draft.unused)
    assert read.parameters.keys() == shapes_of(dataclasses.replace(subject.model, scan=False)).keys()


def _text(value: Any) -> str:
    return "none" if value is None else "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
