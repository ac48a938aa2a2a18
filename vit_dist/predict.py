"""Classify image files with a trained run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_dist.config import ConfigError, Data, pair
from vit_dist.data.pictures.images import CHANNELS, BadImage
from vit_dist.data.sets.examples import distinct_names
from vit_dist.data.stream.pixels import evaluation_image
from vit_dist.job import processes
from vit_dist.mesh.feed import batch_sharding, put
from vit_dist.paths import expanded
from vit_dist.program import restored
from vit_dist.recipes import Overrides
from vit_dist.run.workdir import class_names, read_config
from vit_dist.step.evaluation import model_input


def predict(
    workdir: str | Path,
    files: Sequence[str | Path],
    *,
    top: int = 5,
    step: int | None = None,
    best: bool = False,
    overrides: Overrides = (),
) -> list[dict[str, Any]]:
    """Classifies image files, cropped and resized as for evaluation, by the moving average where the run keeps one.

    Args:
      workdir: the directory of the run.
      files: the images, in any format that OpenCV reads.
      top: how many classes to return.
      step: the checkpoint of this step; None: the newest, or with `best` that of the highest top-1.
      best: see `step`.
      overrides: changes of the run's config that leave it the same, such as {"fake_devices": 1}.

    Returns:
      For each file `{"file", "classes": [{"name", "probability"}, ...]}`, the most probable class first.

    Raises:
      ConfigError: for a file that cannot be read, before anything is computed.
    """
    workdir = expanded(workdir, "workdir")
    if top < 1:
        raise ConfigError(f"top: must be above 0, found {top}")
    settings = read_config(workdir, overrides)
    names = distinct_names(class_names(workdir))
    model = settings.model
    if model.channels not in CHANNELS:
        raise ConfigError(f"model.channels: {model.channels}, but image files are decoded to 1 or 3")
    images = [_read(expanded(file, "predict"), settings.data, pair(model.image_size), model.channels) for file in files]
    processes.start(settings.fake_devices, settings.deadlines)
    if jax.process_count() > 1:
        raise ConfigError("predict: is for one process, and this job has several; run it outside the job")
    with restored(workdir, settings, augment_on_device=False, step=step, best=best) as (program, _, trees):

        @jax.jit
        def probabilities(parameters: Any, images: jax.Array) -> jax.Array:
            inputs = model_input(images, settings.data, settings.model, augment_on_device=False)
            logits = program.model(parameters, inputs)
            return jax.nn.sigmoid(logits) if settings.loss == "sigmoid" else jax.nn.softmax(logits)

        size, sharding = program.evaluation_batch_size(), batch_sharding(program.mesh)
        answers: list[dict[str, Any]] = []
        for start in range(0, len(images), size):
            padded = np.zeros((size, *images[0].shape), np.uint8)
            chunk = images[start : start + size]
            padded[: len(chunk)] = chunk
            batch = put({"image": padded}, sharding, size)["image"]
            result = jax.device_get(probabilities(trees.get("ema", trees["parameters"]), batch))
            for file, row in zip(files[start:], np.asarray(result)[: len(chunk)], strict=False):
                order = np.argsort(-row, kind="stable")[:top]
                classes = [{"name": _name(names, index), "probability": float(row[index])} for index in order]
                answers.append({"file": str(file), "classes": classes})
    return answers


def _read(file: Path, data: Data, size: tuple[int, int], channels: int) -> np.ndarray:
    try:
        return evaluation_image(file.read_bytes(), data, size, channels)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give files that hold an image") from error
    except BadImage as error:
        raise ConfigError(f"{file}: {error}; give files that hold an image") from error


def _name(names: Sequence[str], index: int) -> str:
    """A model may have more classes (`model.num_classes`) than its data had names for."""
    return names[index] if index < len(names) else f"class {index}"
