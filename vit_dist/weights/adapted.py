"""Makes published parameters those of a model of ours: of another image, patch or number of channels, with other
classes, its blocks stacked or not, its parameters split over a mesh.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.model.shape import Shape, shape_of
from vit_dist.weights import fitting
from vit_dist.weights.lazy import Index, Lazy, computed, stacked
from vit_dist.weights.published import Published, by_path, shapes_of
from vit_dist.weights.stored_tensor import printed

Head = Literal["auto", "new", "keep"]


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Parameters of a model of ours by path, the blocks one by one; `notes` say in a sentence each what was changed."""

    parameters: Mapping[str, Lazy]
    notes: tuple[str, ...]


def adapted(
    published: Published, model: config.Model, head: Head = "auto", classes: Sequence[str] | None = None
) -> Adapted:
    """Returns the parameters of `model`, without those of its head if that is to be new.

    Args:
      published: the weights.
      model: ours; only image, patch, channels and classes may differ from the published one in shape.
      head: "keep" takes the published head, of the classes that have the names of ours, or without names all; "new"
        leaves it out; "auto" keeps it if it has all our classes by name.
      classes: the names of ours, if they are known.

    Raises:
      ConfigError: names a parameter that cannot be made of the weights, or classes that a head to keep has not.
    """
    found, notes = dict(published.parameters), []
    old, new = shape_of(published.model), shape_of(model)
    if "position" in found and old.grid != new.grid:
        found["position"] = _resampled(found["position"], old, new)
        notes.append(f"position: resampled from {_by(old.grid)} to {_by(new.grid)} patches")
    if (old.patch, old.channels) != (new.patch, new.channels):
        found["patch/kernel"] = _refitted(found["patch/kernel"], old, new)
        notes.append(
            f"patch/kernel: fitted from {_by(old.patch)} pixels of {old.channels} channels to {_by(new.patch)} of "
            f"{new.channels}"
        )
    notes += _take_head(found, published, new, head, classes)
    shapes = shapes_of(model)
    rest = [path for path in found if path not in shapes]
    for path, shape in shapes.items():
        if path not in found:
            if path.startswith("head/"):
                continue
            raise ConfigError(f"init.weights: {published.origin.files[0]} has no {path}; change the model, see inspect")
        if found[path].shape != shape:
            raise ConfigError(
                f"init.weights: {path} has the shape {list(found[path].shape)} in {published.origin.files[0]}, "
                f"expected {list(shape)}; change the model, see inspect"
            )
    if rest:
        more = f" and {len(rest) - 4} more" if len(rest) > 4 else ""
        raise ConfigError(
            f"init.weights: the model has no place for {', '.join(rest[:4])}{more} of {published.origin.files[0]}; "
            "change the model, see inspect"
        )
    left_out = published.left_out
    if left_out:
        notes.append(f"not used: {', '.join(left_out[:6])}{', ...' if len(left_out) > 6 else ''}")
    return Adapted(found, tuple(notes))


def placed(parameters: Mapping[str, Lazy], like: Any, mesh: Mesh) -> Any:
    """Returns parameters on the devices of a mesh; each process reads what its own devices hold.

    Args:
      parameters: by path, the blocks one by one.
      like: nested dicts of arrays or their shapes; blocks may be stacked. An array of a new head or of an adapter,
        whose path `parameters` does not have, is returned as it is; others are deleted as soon as theirs are placed.
      mesh: the mesh that their shardings are of.
    """

    def place(path: str, leaf: Any) -> jax.Array:
        if "/lora/" in path or (path.startswith("head/") and path not in parameters):
            return leaf
        lazy = _at(parameters, path, leaf.shape)
        read: dict[tuple, np.ndarray] = {}  # devices that hold the same share

        def of(index: Index | None) -> np.ndarray:
            assert index is not None
            key = tuple((one.start, one.stop) for one in index)
            if key not in read:
                read[key] = lazy.read(index)
            return read[key]

        array = jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, jax.typeof(leaf).sharding.spec), of)
        if isinstance(leaf, jax.Array):
            leaf.delete()
        return array

    placed = {path: place(path, leaf) for path, leaf in by_path(like).items()}
    return jax.tree.unflatten(jax.tree.structure(like), placed.values())


def _at(parameters: Mapping[str, Lazy], path: str, shape: tuple[int, ...]) -> Lazy:
    """Returns a parameter; of stacked blocks, those of all blocks."""
    if path in parameters:
        return parameters[path]
    within = path.removeprefix("blocks/")
    return stacked([parameters[f"blocks/{number}/{within}"] for number in range(shape[0])], 0)


def _resampled(position: Lazy, old: Shape, new: Shape) -> Lazy:
    before = position.shape[0] - old.patches
    shape = (before + new.patches, position.shape[1])
    return computed(shape, lambda whole: fitting.resample_positions(whole, old.grid, new.grid, before), position)


def _refitted(kernel: Lazy, old: Shape, new: Shape) -> Lazy:
    width = kernel.shape[1]

    def refit(whole: np.ndarray) -> np.ndarray:
        pixels = whole.reshape(*old.patch, old.channels, width)
        pixels = fitting.adapt_channels(fitting.resample_patch_kernel(pixels, new.patch), new.channels)
        return pixels.reshape(-1, width)

    return computed((math.prod(new.patch) * new.channels, width), refit, kernel)


def _take_head(
    found: dict[str, Lazy], published: Published, new: Shape, head: Head, classes: Sequence[str] | None
) -> list[str]:
    """Leaves the head's parameters in `found`, takes them out, or takes some of its classes; returns what was done."""
    names, count = published.description.classes, published.model.num_classes or 0
    kernel, bias = (found.pop(f"head/{name}", None) for name in ("kernel", "bias"))
    if not new.classes:
        return ["head: left out"] if count else []
    # Classes of ours without a row of their own: ImageNet has two kinds of crane.
    rows, lacking = list(range(count)), list[str]()
    if classes is not None and names is not None and list(classes) != list(names):
        times = collections.Counter(names)
        place = {name: row for row, name in enumerate(names) if times[name] == 1}
        rows = [place[name] for name in classes if name in place]
        lacking = [name for name in classes if name not in place]
    if head == "keep" and (lacking or len(rows) != new.classes):
        problem = "there is none" if not count else f"it has {count} classes and the model {new.classes}"
        if lacking:
            problem = f"it has no class of its own named {printed(', '.join(lacking))}"
        raise ConfigError(
            f"init.head: keep, but of the head of {published.origin.files[0]}, {problem}; set init.head=new"
        )
    unnamed = classes is None or names is None
    if head == "new" or lacking or len(rows) != new.classes or (head == "auto" and unnamed):
        theirs = f"; that of the weights has {count}{', without names' if names is None else ''}" if count else ""
        return [f"head: new, for {new.classes} classes{theirs}"]
    assert kernel is not None and bias is not None
    found |= {"head/kernel": kernel, "head/bias": bias}
    if rows == list(range(count)):
        return []
    found["head/kernel"] = computed((kernel.shape[0], len(rows)), lambda whole: whole[:, rows], kernel)
    found["head/bias"] = computed((len(rows),), lambda whole: whole[rows], bias)
    return [f"head: {len(rows)} of its {count} classes, by name"]


def _by(sides: tuple[int, int]) -> str:
    return f"{sides[0]}x{sides[1]}"
