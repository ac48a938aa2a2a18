"""Classifies image files, a few or many, with a trained run or with weights of others."""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_dist.config import ConfigError, pair
from vit_dist.data.pictures.images import CHANNELS
from vit_dist.data.progress_bar import bar
from vit_dist.data.stream.image_files import find_images, read_ahead
from vit_dist.data.stream.pixels import evaluation_image
from vit_dist.escape import printable
from vit_dist.job import processes
from vit_dist.load import Opened, class_name, opened, start_devices
from vit_dist.mesh.feed import batch_sharding, put, rounded_up
from vit_dist.model.attention_maps import attention_maps
from vit_dist.overlays import Overlays
from vit_dist.program import make_mesh
from vit_dist.recipes import Overrides
from vit_dist.run.checkpoints import Step
from vit_dist.step.evaluation import evaluation_batch_size, model_input
from vit_dist.step.state import Parameters

_MAPS_AT_A_TIME = 8  # images on a device, whose attention weights are in memory a block at a time

_log = logging.getLogger(__name__)
Prediction = dict[str, Any]


def predict(
    model: str | Path,
    files: Sequence[str | Path],
    *,
    top: int = 5,
    step: Step = "newest",
    attention: str | Path | None = None,
    overrides: Overrides = (),
) -> list[Prediction]:
    """Classifies image files, cropped and resized as for evaluation, by the moving average where the run keeps one.

    Args:
      model: the workdir of a run, or weights, as for `load`.
      files: the images, in any format that OpenCV reads; folders of them; or patterns, such as "photos/**/*.jpg".
      top: how many classes to return.
      step: which checkpoint of a run.
      attention: a new folder, which gets two pictures for each image: where the model looks. See `Overlays`.
      overrides: changes of the config, such as {"fake_devices": 1}; of a run, those that leave it the same.

    Returns:
      For each file `{"file", "classes": [{"name", "probability"}, ...]}`, the most probable class first; for one that
      does not decode `{"file", "error"}`. A model without a head has no classes.

    Raises:
      ConfigError: for a file that is not there, before anything is computed; and for a model without a head, unless
        `attention` is asked for.
    """
    found = predictions(model, files, top=top, step=step, attention=attention, overrides=overrides)
    return list(found)


def predictions(
    model: str | Path,
    files: Sequence[str | Path],
    *,
    top: int = 5,
    step: Step = "newest",
    attention: str | Path | None = None,
    overrides: Overrides = (),
) -> Iterator[Prediction]:
    """Yields what `predict` returns, a batch at a time, so that any number of files can be classified."""
    if top < 1:
        raise ConfigError(f"top: must be above 0, found {top}")
    images = find_images(files, "predict")
    overlays = None if attention is None else Overlays(attention)
    start_devices(model, overrides, "predict")
    if jax.process_count() > 1:
        raise ConfigError("predict: is for one process, and this job has several; run it outside the job")
    chosen = opened(model, overrides, step, "predict")
    settings = chosen.settings.model
    if settings.channels not in CHANNELS:
        raise ConfigError(f"model.channels: {settings.channels}, but image files are decoded to 1 or 3")
    if not settings.num_classes and overlays is None:
        raise ConfigError("predict: these weights have no head that classifies; use features instead")
    with overlays or contextlib.nullcontext():
        yield from _each(chosen, images, top, overlays)


def _each(chosen: Opened, files: Sequence[Path], top: int, overlays: Overlays | None) -> Iterator[Prediction]:
    settings, data = chosen.settings, chosen.settings.data
    mesh = make_mesh(settings, jax.devices())
    function, parameters = chosen.place(mesh)
    decode = functools.partial(
        evaluation_image, data=data, size=pair(settings.model.image_size), channels=settings.model.channels
    )
    wanted = evaluation_batch_size(settings)
    if overlays is not None:
        wanted = min(wanted, _MAPS_AT_A_TIME * mesh.size)
    with jax.set_mesh(mesh):
        size = rounded_up(mesh, min(wanted, len(files)))
        sharding = batch_sharding(mesh)

        @jax.jit
        def run(parameters: Parameters, images: jax.Array) -> dict[str, Any]:
            inputs = model_input(images, data, settings.model, augment_on_device=False)
            maps = {} if overlays is None else attention_maps(function.module(parameters), inputs)
            if not settings.model.num_classes:
                return maps
            logits = function(parameters, inputs)
            chances = jax.nn.sigmoid(logits) if settings.loss == "sigmoid" else jax.nn.softmax(logits)
            return {"chances": chances, **maps}

        with bar() as progress:
            task = progress.add_task("images", total=len(files))
            read = read_ahead(files, decode, threads=data.threads, ahead=2 * size)
            for batch in _batches(read, size):
                processes.alive()
                images = [pixels for _, pixels in batch if not isinstance(pixels, str)]
                found: dict[str, np.ndarray] = {}
                if images:
                    padded = np.zeros((size, *images[0].shape), np.uint8)
                    padded[: len(images)] = images
                    found = jax.device_get(run(parameters, put({"image": padded}, sharding, size)["image"]))
                row = 0
                for file, pixels in batch:
                    if isinstance(pixels, str):
                        _log.warning("%s: %s", printable(str(file)), pixels)
                        yield {"file": str(file), "error": pixels}
                        continue
                    if overlays is not None:
                        overlays.write(file, pixels, {name: found[name][row] for name in ("rollout", "last")})
                    classes = _best(found["chances"][row], top, chosen.classes) if "chances" in found else []
                    yield {"file": str(file), "classes": classes}
                    row += 1
                progress.advance(task, len(batch))


def _batches(read: Iterator[tuple[Path, np.ndarray | str]], size: int) -> Iterator[list[tuple[Path, np.ndarray | str]]]:
    """Yields files with their pixels, so many images at a time; what did not decode comes with them, in order."""
    batch: list[tuple[Path, np.ndarray | str]] = []
    count = 0
    for file, pixels in read:
        batch.append((file, pixels))
        count += not isinstance(pixels, str)
        if count == size or len(batch) >= 2 * size:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


def _best(chances: np.ndarray, top: int, names: Sequence[str]) -> list[dict[str, Any]]:
    order = np.argsort(-chances, kind="stable")[:top]
    return [{"name": class_name(names, index), "probability": float(chances[index])} for index in order]
