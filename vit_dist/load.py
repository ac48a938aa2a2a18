"""Opens a trained model for use: a run of ours, or weights of others."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from PIL import Image

from vit_dist import config
from vit_dist.config import ConfigError, pair
from vit_dist.data.pictures.images import CHANNELS, BadImage, convert_channels, convertible, pixels_of
from vit_dist.data.sets.examples import distinct_names
from vit_dist.data.stream.pixels import evaluation_image, evaluation_pixels
from vit_dist.initial import open_earlier
from vit_dist.mesh import layout, topology
from vit_dist.mesh.feed import batch_sharding
from vit_dist.paths import expanded
from vit_dist.program import check_model
from vit_dist.recipes import Overrides, override
from vit_dist.run import workdir as run_files
from vit_dist.schema import build, flatten
from vit_dist.step.state import ModelFunction, Parameters
from vit_dist.weights.adapted import Adapted, adapted, placed
from vit_dist.weights.published import Published, open_published

BATCH = 64  # images at a time on a device
Picture = str | Path | Image.Image | np.ndarray  # a file, or pixels uint8 [H, W], [H, W, C]


class Loaded:
    """A model with its parameters on a mesh, the preparation of its images, and the names of its classes.

    Attributes:
      settings: the config; `model` and `data` say what it is and how its images are prepared.
      classes: the names of its classes; empty without a head, or where nothing tells them.
      notes: what of the weights was changed or left out, a sentence each.
    """

    def __init__(
        self,
        settings: config.Config,
        function: ModelFunction,
        parameters: Parameters,
        mesh: jax.sharding.Mesh,
        classes: Sequence[str],
        notes: Sequence[str] = (),
    ):
        self.settings, self.classes, self.notes = settings, tuple(classes), tuple(notes)
        self._parameters, self._mesh = parameters, mesh
        self._logits = jax.jit(lambda parameters, images: function.module(parameters)(images))
        self._features = jax.jit(lambda parameters, images: function.module(parameters).features(images))

    def model(self, images: Any) -> np.ndarray:
        """Returns the logits [B, classes] of normalised images [B, H, W, C]; without a head their features."""
        return self._run(self._logits, images)

    def features(self, images: Any) -> np.ndarray:
        """Returns what the head classifies, [B, features], of normalised images [B, H, W, C]."""
        return self._run(self._features, images)

    def preprocess(self, picture: Picture) -> np.ndarray:
        """Returns a picture as the model's input, float32 [H, W, C], resized, cropped and normalised as for evaluation.

        Raises `ConfigError` for a file that is no image, and pixels of another type than uint8.
        """
        model, data = self.settings.model, self.settings.data
        size, channels = pair(model.image_size), model.channels
        if not isinstance(picture, np.ndarray) and channels not in CHANNELS:
            raise ConfigError(f"picture: the model takes {channels} channels; give arrays uint8 [H, W, {channels}]")
        if isinstance(picture, str | Path):
            path = expanded(picture, "picture")
            try:
                pixels = evaluation_image(path.read_bytes(), data, size, channels)
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror}; give files that hold an image") from error
            except BadImage as error:
                raise ConfigError(f"{path}: {error}; give files that hold an image") from error
        else:
            pixels = evaluation_pixels(_pixels(picture, channels), data, size)
        mean, std = (np.asarray(value, np.float32) for value in (data.mean, data.std))
        return (pixels / np.float32(255) - mean) / std

    def predict(self, pictures: Iterable[Picture], top: int = 5) -> list[list[tuple[str, float]]]:
        """Returns the most probable classes of each picture, with their probabilities, the first first.

        Raises `ConfigError` for a model without a head, for a single picture, and as `preprocess`.
        """
        if not self.settings.model.num_classes:
            raise ConfigError("predict: these weights have no head that classifies; use features instead")
        if isinstance(pictures, str | Path | Image.Image) or getattr(pictures, "ndim", 4) != 4:
            raise ConfigError("predict: expected several pictures, found one; give a list, such as [picture]")
        if not isinstance(top, int) or top < 1:
            raise ConfigError(f"predict: top is {top!r}, expected how many classes are wanted, 1 or more")
        images = [self.preprocess(picture) for picture in pictures]
        if not images:
            return []
        logits = self.model(np.stack(images)).astype(np.float64)
        if self.settings.loss == "sigmoid":
            chances = 1 / (1 + np.exp(-logits))
        else:
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            chances = powers / powers.sum(axis=1, keepdims=True)
        return [
            [(self._name(index), float(row[index])) for index in np.argsort(-row, kind="stable")[:top]]
            for row in chances
        ]

    def _name(self, index: int) -> str:
        return self.classes[index] if index < len(self.classes) else f"class {index}"

    def _run(self, function: Any, images: Any) -> np.ndarray:
        """Runs a function on images, in batches padded to a number that divides over the mesh."""
        if not len(images):
            raise ConfigError("images: there are none; give [B, H, W, C] with at least one")
        images = np.asarray(images)
        with jax.set_mesh(self._mesh):
            shards = layout.shard_count("batch")
            size = min(math.ceil(len(images) / shards), BATCH) * shards  # so that many images compile one program
            padding = -len(images) % size
            padded = np.concatenate([images, np.zeros((padding, *images.shape[1:]), images.dtype)])
            batches = [padded[start : start + size] for start in range(0, len(padded), size)]
            sharding = batch_sharding(self._mesh)
            results = [jax.device_get(function(self._parameters, jax.device_put(one, sharding))) for one in batches]
            return np.concatenate(results)[: len(images)]


def load(
    name: str | Path,
    mesh: Mapping[str, int] | None = None,
    overrides: Overrides = (),
    step: int | Literal["newest", "best"] = "newest",
) -> Loaded:
    """Opens a run of ours (the moving average of its parameters where there is one), or weights of others.

    Args:
      name: the workdir of a run; or a folder, a file, or a name on the Hugging Face hub, as for `init.weights`.
      mesh: the sizes of the mesh's axes, such as {"fsdp": 8}; None: one device.
      overrides: changes of `data` and `model`, such as {"model.image_size": 384}.
      step: which checkpoint of a run.

    Raises:
      ConfigError: there is no such model, or nothing says how its images are prepared; the error names the key to set.
    """
    opened = open_model(name, overrides, step)
    devices = _mesh(opened.settings, mesh)
    with jax.set_mesh(devices):
        function = ModelFunction(opened.settings.model)
        abstract = jax.eval_shape(lambda: function.initialise(0))
        parameters = placed(opened.fitted.parameters, abstract, devices)
    return Loaded(opened.settings, function, parameters, devices, opened.classes, opened.fitted.notes)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model whose parameters are not read yet.

    Attributes:
      published: the weights as they lie in their files.
      settings: the config; `model` and `data` say what it is and how its images are prepared.
      fitted: the parameters of this model.
      classes: as `Loaded` has them.
    """

    published: Published
    settings: config.Config
    fitted: Adapted
    classes: tuple[str, ...]


def open_model(
    name: str | Path, overrides: Overrides = (), step: int | Literal["newest", "best"] = "newest", key: str = "load"
) -> Opened:
    """Opens what `load` loads, with the same arguments and errors; `key` begins these."""
    if not isinstance(name, str | Path):
        raise ConfigError(f"{key}: expected a folder, a file or a name, found {type(name).__name__}")
    path = expanded(name, key)
    values = config.to_dict(config.typed({"total_steps": 1}))
    given = _given(values, overrides)
    if str(name) and run_files.holds_run(path):
        published = open_earlier(path, step, f"{key}: step")
        values = config.to_dict(run_files.read_config(path))
    elif step != "newest":
        raise ConfigError(f"{key}: step: {step}, but {name} holds no run of ours; leave it out")
    else:
        published = open_published(name, key, given)
    described = {f"model.{key}": value for key, value in published.description.model.items()}
    described |= published.description.preprocessing(given)
    settings = config.resolve(override(override(values, described), overrides))
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, scan=False, remat="none"))
    wanted, count = settings.model.num_classes, published.model.num_classes
    if wanted not in (0, count):
        raise ConfigError(f"model.num_classes: {wanted}, but {name} has {count}; leave it out, or set 0 for features")
    classes = distinct_names(published.description.classes or ()) if wanted else ()
    return Opened(published, settings, adapted(published, settings.model, "keep"), tuple(classes))


def _given(values: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Returns the values of the keys that overrides set, by key; `values` are those of a config."""
    changed = flatten(override(copy.deepcopy(values), overrides))
    keys = flatten(overrides) if isinstance(overrides, Mapping) else [each.partition("=")[0] for each in overrides]
    return {key: changed[key] for key in keys}


def _mesh(settings: config.Config, sizes: Mapping[str, int] | None) -> jax.sharding.Mesh:
    wanted = build(config.Mesh, {"data": 1, **sizes} if isinstance(sizes, Mapping) else sizes or {"data": 1}, "mesh")
    full = topology.axis_sizes(wanted, jax.device_count())
    check_model(settings.model, full)
    return topology.make_mesh(full, jax.devices())


def _pixels(picture: Image.Image | np.ndarray, channels: int) -> np.ndarray:
    """Returns a picture in memory as uint8 [H, W, channels]."""
    if isinstance(picture, Image.Image):
        try:
            return pixels_of(picture, channels)
        except BadImage as error:
            raise ConfigError(f"picture: {error}; give an image that can be read") from error
    if not isinstance(picture, np.ndarray):
        raise ConfigError(f"picture: expected a path, an image of Pillow or an array, found {type(picture).__name__}")
    pixels = picture[:, :, None] if picture.ndim == 2 else picture
    fits = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.size and convertible(pixels.shape[2], channels)
    if not fits:
        raise ConfigError(
            f"picture: expected pixels uint8 [H, W, {channels}] or [H, W, 1], found {list(pixels.shape)} of "
            f"{pixels.dtype}; convert them first"
        )
    return convert_channels(pixels, channels)
