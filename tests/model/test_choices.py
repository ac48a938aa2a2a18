"""What "auto" in `model.scan` and `model.remat` becomes."""

import logging

import pytest
from flax import nnx

from vit_dist import ViT, config
from vit_dist.model.choices import decided
from vit_dist.model.saved import LocalShape, saved_arrays, saved_bytes

L16 = config.resolve({"total_steps": 1, "model": {"variant": "L/16", "dtype": "bfloat16", "num_classes": 10}}).model
KINDS = {"gpu": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5 lite", "cpu": "cpu"}


def model(**settings):
    return config.resolve({"total_steps": 1, "model": {"num_classes": 10, **settings}}).model


@pytest.mark.parametrize(
    ("platform", "variant", "scan"),
    [("gpu", "S/16", False), ("gpu", "L/16", False), ("gpu", "g/14", True), ("cpu", "S/16", True)],
)
def test_blocks_are_unrolled_on_gpus_up_to_24_of_them(platform, variant, scan):
    assert decided(model(variant=variant, image_size=224), platform, KINDS[platform]).scan is scan


def test_remat_is_the_least_that_leaves_half_of_the_memory():
    """A block of L/16 at 197 tokens saves 24 bytes a token and channel without remat, 20 by name and 2 at least."""
    local = LocalShape(197, 1024, 16, 64, 4096)
    sizes = [24 * saved_bytes(saved_arrays(model(variant="L/16", dtype="bfloat16", remat=remat), "cudnn"), local)
             for remat in ("none", "names", "block")]  # fmt: skip
    assert sizes == sorted(sizes, reverse=True)
    memory = 80 * 10**9

    def remat(examples):
        return decided(L16, "gpu", KINDS["gpu"], examples=examples, memory_bytes=memory).remat

    none, names = (memory / 2 / size for size in sizes[:2])
    assert [remat(none * 0.999), remat(none * 1.001)] == ["none", "names"]
    assert [remat(names * 0.999), remat(names * 1.001), remat(1e6)] == ["names", "block", "block"]


def test_without_a_known_memory_nothing_is_computed_again():
    assert decided(L16, "cpu", "cpu", examples=1e9).remat == "none"


def test_what_a_config_says_is_left_as_it_is(caplog):
    caplog.set_level(logging.INFO)
    given = model(variant="L/16", scan=True, remat="block")
    assert decided(given, "gpu", KINDS["gpu"], examples=1.0, memory_bytes=10**12) == given
    assert not caplog.messages


def test_a_choice_is_printed(caplog):
    caplog.set_level(logging.INFO)
    decided(L16, "gpu", KINDS["gpu"])
    assert [message.partition(":")[0] for message in caplog.messages] == ["model.scan=auto", "model.remat=auto"]
    assert "false" in caplog.messages[0] and "none" in caplog.messages[1]


def test_a_model_on_its_own_decides_for_the_host():
    made = nnx.eval_shape(lambda: ViT(width=8, depth=2, mlp=8, heads=2, num_classes=3, image_size=8, patch_size=4,
                                      rngs=nnx.Rngs(0)))  # fmt: skip
    assert (made.model.scan, made.model.remat) == (True, "none")
