"""Makes a model another one that computes the same, for a format that has no other: zeros and ones are filled in.

A function takes the model and the value that a trait is to have; it returns the other model, or None where there is
none. The outputs are the same up to rounding; without a head, a projection becomes one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from vit_dist.model.position import sincos2d
from vit_dist.model.shape import shape_of
from vit_dist.weights.description import Subject

_BIASES = {"qkv_bias": "attention/qkv", "projection_bias": "attention/projection"}


def _changed(subject: Subject, parameters: dict[str, np.ndarray], **traits: Any) -> Subject:
    model = dataclasses.replace(subject.model, **traits)
    return dataclasses.replace(subject, model=model, parameters={**subject.parameters, **parameters})


def _position(subject: Subject, wanted: Any) -> Subject | None:
    """Learned positions of the fixed ones, or of zeros where there are none."""
    kind, shape = subject.model.position, shape_of(subject.model)
    if wanted != "learned" or kind not in ("sincos2d", "none"):
        return None
    zeros = np.zeros((shape.patches, shape.width), np.float32)
    table = np.asarray(sincos2d(*shape.grid, shape.width), np.float32) if kind == "sincos2d" else zeros
    return _changed(subject, {"position": table}, position="learned", cls_position=False)


def _cls_position(subject: Subject, wanted: Any) -> Subject | None:
    """A position of zeros for the class token, or its position added to it."""
    rows, cls = subject.parameters.get("position"), subject.parameters.get("cls")
    if rows is None or cls is None:
        return None
    if wanted:
        return _changed(subject, {"position": np.concatenate([np.zeros_like(rows[:1]), rows])}, cls_position=True)
    return _changed(subject, {"position": rows[1:], "cls": cls + rows[0]}, cls_position=False)


def _layer_scale(subject: Subject, wanted: Any) -> Subject | None:
    """Scales of one, or the layers before them with their scales."""
    shape = shape_of(subject.model)
    scales = {f"blocks/{i}/scale{branch}/scale": (i, branch) for i in range(shape.depth) for branch in (1, 2)}
    if wanted is not None:
        return _changed(subject, {path: np.ones(shape.width, np.float32) for path in scales}, layer_scale=1.0)
    parameters = dict(subject.parameters)
    for path, (number, branch) in scales.items():
        scale, last = parameters.pop(path), ("attention/projection", "mlp/down")[branch - 1]
        for kind in ("kernel", "bias"):
            scaled = f"blocks/{number}/{last}/{kind}"
            if scaled in parameters:
                parameters[scaled] = parameters[scaled] * scale
    model = dataclasses.replace(subject.model, layer_scale=None)
    return dataclasses.replace(subject, model=model, parameters=parameters)


def _bias(key: str, subject: Subject, wanted: Any) -> Subject | None:
    """Biases of zero."""
    if not wanted:
        return None
    shape = shape_of(subject.model)
    size = (3, shape.heads, shape.width // shape.heads) if key == "qkv_bias" else (shape.width,)
    names = (f"blocks/{number}/{_BIASES[key]}/bias" for number in range(shape.depth))
    return _changed(subject, {name: np.zeros(size, np.float32) for name in names}, **{key: True})


def _pool(subject: Subject, wanted: Any) -> Subject | None:
    """A head of class token and mean, of which one counts zero times."""
    kernel, pool = subject.parameters.get("head/kernel"), subject.model.pool
    plain = subject.model.output_projection is None and subject.model.pre_logits is None
    if wanted != "cls_mean" or pool not in ("cls", "mean") or kernel is None or not plain:
        return None
    if subject.model.pool_norm != "before" or "cls" not in subject.parameters:
        return None
    halves = [kernel, np.zeros_like(kernel)]
    return _changed(
        subject, {"head/kernel": np.concatenate(halves if pool == "cls" else halves[::-1])}, pool="cls_mean"
    )


def _output_projection(subject: Subject, wanted: Any) -> Subject | None:
    """The projection as the head, or in it."""
    if wanted is not None or subject.model.pre_logits is not None:
        return None
    parameters = dict(subject.parameters)
    kernel = parameters.pop("output_projection/kernel")
    if "head/kernel" in parameters:
        parameters["head/kernel"] = kernel @ parameters["head/kernel"]
    else:
        parameters |= {"head/kernel": kernel, "head/bias": np.zeros(kernel.shape[1], np.float32)}
    classes = parameters["head/kernel"].shape[1]
    model = dataclasses.replace(subject.model, output_projection=None, num_classes=classes)
    return dataclasses.replace(subject, model=model, parameters=parameters)


EQUIVALENTS: dict[str, Callable[[Subject, Any], Subject | None]] = {
    "position": _position,
    "cls_position": _cls_position,
    "layer_scale": _layer_scale,
    "qkv_bias": lambda subject, wanted: _bias("qkv_bias", subject, wanted),
    "projection_bias": lambda subject, wanted: _bias("projection_bias", subject, wanted),
    "pool": _pool,
    "output_projection": _output_projection,
}


def without_patch_bias(subject: Subject) -> Subject | None:
    """Returns the model with the bias of its patches in their positions; None if they have no learned ones."""
    bias, position = subject.parameters["patch/bias"], subject.parameters.get("position")
    if position is None or subject.model.embedding_norm == "patches":
        return None
    before = len(position) - shape_of(subject.model).patches
    moved = np.concatenate([position[:before], position[before:] + bias])
    return _changed(subject, {"patch/bias": np.zeros_like(bias), "position": moved})
