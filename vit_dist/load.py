"""Opens a trained model for use: a run of ours, or weights of others."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from vit_dist import config
from vit_dist.config import ConfigError, pair
from vit_dist.data.files import read_file
from vit_dist.data.pictures.images import CHANNELS, BadImage, convert_channels, convertible, pixels_of
from vit_dist.data.sets.examples import distinct_names
from vit_dist.data.stream.pixels import evaluation_image, evaluation_pixels
from vit_dist.initial import open_earlier
from vit_dist.job import processes
from vit_dist.mesh import layout, topology
from vit_dist.mesh.feed import batch_sharding
from vit_dist.model.attention_maps import attention_maps, attention_weights
from vit_dist.paths import expanded
from vit_dist.program import check_model
from vit_dist.recipes import Overrides, override
from vit_dist.run import workdir as run_files
from vit_dist.run.checkpoints import Step
from vit_dist.schema import build, flatten
from vit_dist.step.state import ModelFunction, Parameters
from vit_dist.weights.adapted import Adapted, adapted, placed
from vit_dist.weights.published import Published, open_published

_SELECTION = ("data.classes", "data.fraction")
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
        self._attention = jax.jit(lambda parameters, images: attention_weights(function.module(parameters), images))
        self._maps = jax.jit(lambda parameters, images: attention_maps(function.module(parameters), images))

    def model(self, images: Any) -> np.ndarray:
        """Returns the logits [B, classes] of normalised images [B, H, W, C]; without a head their features."""
        return self._run(self._logits, images)

    def features(self, images: Any) -> np.ndarray:
        """Returns what the head classifies, [B, features], of normalised images [B, H, W, C]."""
        return self._run(self._features, images)

    def attention(self, images: Any) -> np.ndarray:
        """Returns the attention weights [B, blocks, H, N, N], float32, of normalised images [B, H, W, C].

        The N tokens are the class token and registers, where the model has them, then the patches row by row. A row
        sums to 1. For B/16 of 224 pixels that is 22 MB an image.
        """
        return self._run(self._attention, images, most=1)

    def attention_maps(self, images: Any) -> dict[str, np.ndarray]:
        """Returns the maps "rollout" and "last" over the patches, [B, rows, columns], of normalised images.

        `vit_dist.model.attention_maps` says what they are.
        """
        return self._run(self._maps, images, most=8)

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
                pixels = evaluation_image(read_file(path), data, size, channels)
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror or error}; give files that hold an image") from error
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
            [(class_name(self.classes, index), float(row[index])) for index in np.argsort(-row, kind="stable")[:top]]
            for row in chances
        ]

    def _run(self, function: Any, images: Any, most: int | None = None) -> Any:
        """Runs a function on images, in batches of at most `most` a device (None: `BATCH`), padded for the mesh."""
        if not len(images):
            raise ConfigError("images: there are none; give [B, H, W, C] with at least one")
        images = np.asarray(images)
        with jax.set_mesh(self._mesh):
            shards = layout.shard_count("batch")
            # So that many images compile one program.
            size = min(math.ceil(len(images) / shards), most or BATCH) * shards
            padding = -len(images) % size
            padded = np.concatenate([images, np.zeros((padding, *images.shape[1:]), images.dtype)])
            batches = [padded[start : start + size] for start in range(0, len(padded), size)]
            sharding = batch_sharding(self._mesh)
            results = [jax.device_get(function(self._parameters, jax.device_put(one, sharding))) for one in batches]
            return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *results)


def load(
    name: str | Path,
    mesh: Mapping[str, int] | None = None,
    overrides: Overrides = (),
    step: Step = "newest",
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
    model = opened(name, overrides, step)
    devices = _mesh(model.settings, mesh)
    function, parameters = model.place(devices)
    return Loaded(model.settings, function, parameters, devices, model.classes, model.fitted.notes)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model whose parameters are not yet read.

    Attributes:
      settings: the config, with `model.num_classes` filled in.
      published: its weights.
      fitted: the parameters of the model that `settings` describe.
      classes: the names of its classes; empty if nothing tells them.
    """

    settings: config.Config
    published: Published
    fitted: Adapted
    classes: tuple[str, ...]

    def place(self, mesh: jax.sharding.Mesh) -> tuple[ModelFunction, Parameters]:
        """Returns the model and its parameters on the devices of a mesh."""
        with jax.set_mesh(mesh):
            function = ModelFunction(self.settings.model)
            return function, placed(self.fitted.parameters, jax.eval_shape(lambda: function.initialise(0)), mesh)


def opened(name: str | Path, overrides: Overrides = (), step: Step = "newest", key: str = "load") -> Opened:
    """Opens what `load` opens; args and errors are those of `load`, and the errors begin with `key`."""
    if not isinstance(name, str | Path):
        raise ConfigError(f"{key}: expected a folder, a file or a name, found {type(name).__name__}")
    path, values = base(name, key)
    given = _given(values, overrides)
    if path is not None:
        verify = config.typed(override(copy.deepcopy(values), overrides)).checkpoint.verify
        published = open_earlier(path, step, f"{key}: step", verify=verify)
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
    fitted = adapted(published, settings.model, "keep")
    classes = distinct_names(published.description.classes or ()) if wanted else ()
    return Opened(settings, published, fitted, tuple(classes))


def base(name: str | Path, key: str = "load") -> tuple[Path | None, dict[str, Any]]:
    """Returns what is known of a model before its weights are opened.

    That is the workdir and the config of a run; or, of weights of others, None and the defaults.
    """
    path = expanded(name, key)
    # Process 0 looks for all: a network file system may show the others an older state.
    if str(name) and processes.gather(run_files.holds_run(path))[0]:
        return path, config.to_dict(run_files.read_config(path))
    return None, config.to_dict(config.typed({"total_steps": 1}))


def start_devices(
    name: str | Path, overrides: Overrides = (), key: str = "load", *, on_other_data: bool = False
) -> None:
    """Makes the devices, and joins the job, as the config of a run or the overrides say; see `processes.start`.

    Raises `ConfigError` where overrides would make another run of a run. On data that are not the run's they may select
    classes and a fraction.
    """
    path, values = base(name, key)
    if path is not None:
        settings = run_files.read_config(path, _without(overrides, _SELECTION) if on_other_data else overrides)
    else:
        settings = config.typed(override(values, overrides))
    processes.start(settings.fake_devices, settings.deadlines, workdir=path)


def _given(values: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Returns the values of the keys that overrides set, by key; `values` are those of a config."""
    changed = flatten(override(copy.deepcopy(values), overrides))
    return {key: changed[key] for key in set_keys(overrides)}


def _without(overrides: Overrides, keys: Sequence[str]) -> Overrides:
    if isinstance(overrides, Mapping):
        return {key: value for key, value in flatten(overrides).items() if key not in keys}
    return [each for each in overrides if each.partition("=")[0] not in keys]


def class_name(names: Sequence[str], index: int) -> str:
    """Returns the name of a class; a model may have more classes (`model.num_classes`) than its data had names for."""
    return names[index] if index < len(names) else f"class {index}"


def check_run(workdir: str | Path, step: int | None = None, overrides: Overrides = ()) -> Path:
    """Returns the directory.

    Raises `ConfigError` if it holds no run with a checkpoint of this step (None: of any), or overrides change the run.
    """
    path = expanded(workdir, "workdir")
    run_files.read_config(path, overrides)
    steps = run_files.checkpoint_steps(path)
    if not steps:
        raise ConfigError(f"{path}/checkpoints: no checkpoint here; give the workdir of a run that has saved one")
    if step is not None and step not in steps:
        raise ConfigError(f"{path}/checkpoints: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return path


def set_keys(overrides: Overrides) -> list[str]:
    """Returns the keys that overrides set."""
    return list(
        flatten(overrides) if isinstance(overrides, Mapping) else [each.partition("=")[0] for each in overrides]
    )


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
