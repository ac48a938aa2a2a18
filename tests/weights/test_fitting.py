"""Tensors fitted to another shape, against timm's own functions (`benchmarks/peers/fitting_fixtures.py`)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vit_dist.schema import ConfigError
from vit_dist.weights import fitting

CASES = json.loads(Path(__file__).with_name("fitting.json").read_text())["cases"]
TOLERANCE = 1e-4  # of the spread of timm's result


def tensor(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['function']}-{case['seed']}")
def test_a_fitted_tensor_is_timms(case: dict[str, Any]) -> None:
    arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in case["arguments"].items()}
    result = getattr(fitting, case["function"])(tensor(case["seed"], *case["shape"]), **arguments)
    assert result.dtype == np.float32 and list(result.shape) == case["result"]
    values, rng = result.astype(np.float64).ravel(), np.random.RandomState(case["seed"])
    entries = values[rng.choice(values.size, len(case["entries"]))]
    sums = rng.choice([-1.0, 1.0], (len(case["sums"]), values.size)) @ values / np.sqrt(values.size)
    assert np.abs(entries - case["entries"]).max() <= TOLERANCE * case["spread"]
    assert np.abs(sums - case["sums"]).max() <= TOLERANCE * case["spread"]


def test_prefix_tokens_are_kept_and_the_same_grid_changes_nothing() -> None:
    position = tensor(0, 5 + 6, 4)
    assert np.array_equal(fitting.resample_positions(position, (2, 3), (4, 4), 5)[:5], position[:5])
    assert np.array_equal(fitting.resample_positions(position, (2, 3), (2, 3), 5), position)
    assert not np.array_equal(fitting.resample_positions(position, (2, 3), (3, 2), 5), position)
    with pytest.raises(ConfigError, match=r"position: its shape is \(11, 4\), expected 1 \+ 2x3 tokens; set model"):
        fitting.resample_positions(position, (2, 3), (4, 4), 1)


def test_a_kernel_of_larger_patches_answers_to_resized_patches_as_before() -> None:
    kernel, patch = tensor(0, 4, 6, 3, 5), tensor(1, 4, 6, 3)
    down, across = fitting.resize_matrix(4, 8, "bicubic"), fitting.resize_matrix(6, 9, "bicubic")
    larger = np.einsum("Hh,Ww,hwc->HWc", down, across, patch)
    answer = np.einsum("hwc,hwcd->d", larger, fitting.resample_patch_kernel(kernel, (8, 9)))
    np.testing.assert_allclose(answer, np.einsum("hwc,hwcd->d", patch, kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_an_image_of_equal_channels_is_embedded_as_before_with_any_number_of_them(channels: int) -> None:
    kernel = np.repeat(tensor(0, 4, 4, 1, 5), 3, axis=2)
    adapted = fitting.adapt_channels(kernel, channels)
    assert adapted.shape == (4, 4, channels, 5)
    np.testing.assert_allclose(adapted.sum(axis=2), kernel.sum(axis=2), rtol=1e-6)
    assert np.array_equal(fitting.adapt_channels(kernel, 3), kernel)


def test_a_low_precision_tensor_becomes_float32() -> None:
    position = tensor(0, 1 + 4, 3).astype(np.float16)
    assert fitting.resample_positions(position, (2, 2), (3, 3), 1).dtype == np.float32
    assert fitting.resample_positions(position, (2, 2), (2, 2), 1).dtype == np.float32
