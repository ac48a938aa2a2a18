"""The evaluation step and `predict` against the reference in float64."""

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import reference
from reference import Flat, nested, resized
from states import batch_of, random_parameters, state_of

from vit_dist import config, predict
from vit_dist.data.pictures.crop_modes import CropMode
from vit_dist.data.pictures.resize import Interpolation
from vit_dist.data.stream.pixels import evaluation_pixels
from vit_dist.program import Program
from vit_dist.run.checkpoints import Checkpoints
from vit_dist.run.workdir import write_run
from vit_dist.step.evaluation import model_input, zero_totals

CLASSES, BATCH, SIZE = 7, 8, (8, 12)
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.3, 0.4)
MESHES = {"softmax": {"data": 1}, "sigmoid": {"data": 2, "fsdp": 2}}


def settings(loss: str, eval_crop: float | None) -> config.Config:
    model = {
        "width": 16, "depth": 2, "mlp": 24, "heads": 2, "activation": "gelu", "image_size": SIZE, "patch_size": 4,
        "scan": True, "num_classes": CLASSES,
    }  # fmt: skip
    data = {"mean": MEAN, "std": STD, "eval_crop": eval_crop}
    of_training = {"label_smoothing": 0.5, "mixup": 1.0, "ema_decay": 0.9}
    return config.resolve(
        {"total_steps": 1, "batch_size": BATCH, "loss": loss, "mesh": MESHES[loss], **of_training}
        | {"model": model | {"dropout": 0.5, "drop_path": 0.5}}
        | {"data": data | {"crop_area": (0.1, 0.2), "flip": True, "rotate": 30.0}}
    )


def logits_of(configured: config.Config, parameters: Flat, pixels: np.ndarray) -> np.ndarray:
    """The reference's logits of pixels in 0..255 of the model's size."""
    return reference.logits(dataclasses.asdict(configured.model), parameters, (pixels / 255 - MEAN) / STD).data


def pixels(seed: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (BATCH, *size, 3), dtype=np.uint8)


def center(images: np.ndarray) -> np.ndarray:
    """The centre crop of [B, 14, 20, C]: the largest box of the shape 8:12 is 13.3 by 20, and 0.8 of it 10.7 by 16."""
    return resized(images[:, 1:12, 2:18], SIZE, "bilinear")


def test_uncropped_images_are_cropped_to_the_centre_and_resized_on_the_device() -> None:
    def input_pixels(images: np.ndarray, augment_on_device: bool, **data: Any) -> np.ndarray:
        """The model's input, scaled back to pixels."""
        configured = settings("softmax", 0.8)
        changed = dataclasses.replace(configured.data, **data)
        inputs = model_input(images, changed, configured.model, augment_on_device=augment_on_device)
        return (np.asarray(inputs, np.float64) * STD + MEAN) * 255

    uncropped, cropped = pixels(0, (14, 20)), pixels(1, SIZE)
    np.testing.assert_allclose(input_pixels(uncropped, True), center(uncropped), atol=1e-3)
    np.testing.assert_allclose(
        input_pixels(uncropped, True, eval_crop=None, interpolation="bicubic"),
        resized(uncropped, SIZE, "bicubic"),
        atol=1e-3,
    )
    np.testing.assert_allclose(input_pixels(cropped, False), cropped, atol=1e-3)  # the host has cropped these already


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_the_device_crops_as_the_host_does_within_a_grey_level(mode: CropMode, interpolation: Interpolation) -> None:
    configured = settings("softmax", 0.8)
    keys: dict[str, Any] = {"eval_crop_mode": mode, "eval_rounding": "transformers", "interpolation": interpolation}
    data = dataclasses.replace(configured.data, **keys)
    for size in ((14, 21), (21, 14), (6, 5), SIZE):
        uncropped = pixels(2, size)
        inputs = model_input(uncropped, data, configured.model, augment_on_device=True)
        own = (np.asarray(inputs, np.float64) * STD + MEAN) * 255
        for image, host_image in zip(own, (evaluation_pixels(one, data, SIZE) for one in uncropped), strict=True):
            assert np.abs(image - host_image).max() <= 1 + 1e-3


@pytest.mark.parametrize("loss", MESHES)
def test_an_evaluation_sums_loss_and_correct_answers_of_the_rows_that_count(loss: str) -> None:
    configured = settings(loss, 0.8)
    program = Program(configured, classes=CLASSES, steps=1, augment_on_device=True)
    with program.in_use():
        parameters = random_parameters(program, 0)
        own, totals = state_of(program, nested(parameters), nested(parameters)).parameters, zero_totals(CLASSES)
        expected: dict[str, Any] = dict.fromkeys(("loss", "count", "top1", "top5"), 0)
        expected |= {name: np.zeros(CLASSES, int) for name in ("class_count", "class_top1")}
        for seed in (1, 2):
            rng, images = np.random.default_rng(seed), pixels(seed, (14, 20))
            mask, labels = np.arange(BATCH) < 9 - 2 * seed, rng.integers(0, CLASSES, BATCH, dtype=np.int32)
            logits = logits_of(configured, parameters, center(images))
            # At least one correct answer in a row that counts and in one that does not.
            labels[[0, -1]] = logits[[0, -1]].argmax(axis=1)
            batch = batch_of(program, image=images, label=labels, mask=mask)
            totals = program.evaluation_step(own, batch, totals)
            rank = (logits > logits[np.arange(BATCH), labels][:, None]).sum(axis=1)
            expected["loss"] += (
                reference.LOSSES[loss](reference.value(logits), np.eye(CLASSES)[labels]).data[mask].sum()
            )
            expected["count"] += mask.sum()
            expected["top1"] += (mask & (rank < 1)).sum()
            expected["top5"] += (mask & (rank < 5)).sum()
            expected["class_count"] += np.bincount(labels[mask], minlength=CLASSES)
            expected["class_top1"] += np.bincount(labels[mask & (rank < 1)], minlength=CLASSES)
    assert totals.keys() == expected.keys() and expected["count"] == 12
    assert 0 < expected["top1"] < expected["top5"] < expected["count"]
    assert float(totals.pop("loss")) == pytest.approx(expected.pop("loss"), rel=1e-6)
    for name, total in expected.items():
        np.testing.assert_array_equal(totals[name], total, err_msg=name)


@pytest.mark.parametrize("loss", MESHES)
def test_predict_gives_the_probabilities_of_the_loss_by_the_moving_average(loss: str, tmp_path: Path) -> None:
    configured, names = settings(loss, None), tuple("abcdefg")
    program = Program(configured, classes=CLASSES, steps=1, augment_on_device=False)
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", configured, names)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep_last=1, keep_best=0)
    average = random_parameters(program, 1)
    with program.in_use():
        state = state_of(program, nested(random_parameters(program, 0)), nested(average))
        checkpoints.save(1, {"parameters": state.parameters, "ema": state.ema})
    checkpoints.close()
    images = pixels(3, SIZE)[:3]
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, image in zip(files, images, strict=True):
        cv2.imwrite(str(file), image[..., ::-1])
    logits = logits_of(configured, average, images)
    chances = 1 / (1 + np.exp(-logits)) if loss == "sigmoid" else np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for answer, row in zip(predict(tmp_path / "run", files, top=5), chances, strict=True):
        order = np.argsort(-row)[:5]
        assert [entry["name"] for entry in answer["classes"]] == [names[index] for index in order]
        assert [entry["probability"] for entry in answer["classes"]] == pytest.approx(list(row[order]), rel=1e-5)
