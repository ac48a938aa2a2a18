"""The golden fixtures themselves: that their weights can be made again, and that mistakes would show in them."""

import golden_weights
import numpy as np
import pytest
from peers import random_weights

# What a comparison may differ by, over the standard deviation of the outputs.
TOLERANCE = 1e-4


def test_random_weights_are_the_same_everywhere():
    norm = random_weights.weight("blocks.0.norm1.weight", (3,))
    np.testing.assert_array_equal(norm, np.float32([0.979707837, 0.805384815, 0.98054564]))
    kernel = random_weights.weight("blocks.0.mlp.fc2.weight", (2, 2))
    np.testing.assert_array_equal(kernel, np.float32([[-0.171527073, -0.0289927553], [-0.0121136419, -0.0768978894]]))
    np.testing.assert_array_equal(
        random_weights.images(1, 1, 1, 3), np.float32([[[[-1.0208993, 2.36515737, 0.109627485]]]])
    )


def test_random_numbers_have_mean_0_and_variance_1():
    x = random_weights.normal("x", (100_000,))
    assert abs(x.mean()) < 0.01
    assert abs(x.var() - 1) < 0.01


@pytest.mark.parametrize("name", golden_weights.NAMES)
def test_norms_are_not_trivial_and_no_bias_is_zero(name):
    for path, array in golden_weights.tensors(golden_weights.fixture(name)).items():
        x = array.astype(np.float32)
        assert np.isfinite(x).all()
        if "norm" in path.lower() and path.endswith(("weight", "scale")):
            assert 0.6 < x.min() < 1 < x.max() < 1.4
        elif path.endswith("bias"):
            assert np.abs(x).max() > 1e-3


@pytest.mark.parametrize("name", golden_weights.NAMES)
def test_another_epsilon_or_another_gelu_would_show(name):
    fixture = golden_weights.fixture(name)
    assert min(fixture["mistakes"].values()) >= 5 * TOLERANCE
    gates = ("gate_proj", "weights_in", "fc1_g", "mlp.w1")
    gated = any(key in "".join(fixture["tensors"]) for key in gates) or "giant" in name
    assert fixture["mistakes"].keys() == ({"norm_epsilon"} if gated else {"norm_epsilon", "activation"})


@pytest.mark.parametrize("name", golden_weights.NAMES)
def test_outputs_are_float32_rows_for_each_image(name):
    fixture = golden_weights.fixture(name)
    outputs = golden_weights.outputs(fixture)
    assert "logits" in outputs or "features" in outputs
    for value in outputs.values():
        assert len(value) == fixture["images"][0] == 2
        assert np.isfinite(value).all() and value.std() > 1e-3


def test_written_files_hold_the_weights(tmp_path):
    fixture = golden_weights.fixture("npz_big_vision_siglip_bf16")
    with np.load(golden_weights.write(fixture, tmp_path)) as arrays:
        assert arrays["params/img/embedding/kernel"].dtype == np.dtype("V2")
        assert set(arrays.files) == set(fixture["tensors"])
    file = golden_weights.write(golden_weights.fixture("timm_vit_cls"), tmp_path)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    size = sum(array.nbytes for array in golden_weights.tensors(golden_weights.fixture("timm_vit_cls")).values())
    assert file.stat().st_size == 8 + header + size
