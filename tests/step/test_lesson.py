"""The recipe after the d2l.ai lesson against the lesson's own model in Flax Linen, at full size.

The data are 900 images of Fashion-MNIST in `../shared/data`; without them the tests are skipped.
"""

import functools
import gzip
from typing import Any

import jax
import jax.numpy as jnp
import lesson
import numpy as np
import pytest
from reference import resized
from states import batch_of, state_of
from system import DATA, ROOT, largest_difference

from vit_dist import recipes
from vit_dist.model import layers
from vit_dist.program import Program

FOLDER = DATA / "fashion_mnist_900"
NO_DROPOUT = tuple(f"model.{name}=0" for name in ("dropout", "embedding_dropout", "attention_dropout"))
RATE, DROPOUT = 0.1, 0.1

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"{FOLDER} is not here")


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray]:
    """The 700 training images [N, 28, 28, 1] and their labels."""
    images, labels = (
        np.frombuffer(gzip.decompress((FOLDER / f"train-{name}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return images.reshape(-1, 28, 28, 1), labels.astype(np.int32)


def curves(batch_size: int, steps: int, dropout: float, *overrides: str) -> tuple[list[float], list[float]]:
    """The losses of our steps and of the lesson's, from the lesson's parameters on the same images in one order."""
    images, labels = data()
    order = np.resize(np.random.default_rng(1).permutation(len(images)), (steps, batch_size))
    large = resized(images / 255, (lesson.SIDE, lesson.SIDE), "bilinear").astype(np.float32)
    model = lesson.ViT(dropout)
    parameters = model.init(jax.random.key(0), jnp.zeros((1, lesson.SIDE, lesson.SIDE, 1)), False)["params"]
    theirs = lesson.train(model, parameters, RATE, [(large[rows], labels[rows]) for rows in order])

    recipe = ROOT / "configs" / "d2l_fashion_mnist.py"
    configured = recipes.load(recipe, ["mesh.data=1", f"batch_size={batch_size}", *overrides])
    program, ours = Program(configured, classes=lesson.CLASSES, steps=4690, augment_on_device=True), []
    with program.in_use():
        state = state_of(program, lesson.as_ours(jax.tree.map(np.asarray, parameters)))
        for rows in order:
            state, metrics = program.train_step(state, batch_of(program, image=images[rows], label=labels[rows]))
            ours.append(float(metrics["loss"]))
    print(*(f"{our:.5f} {their:.5f}" for our, their in zip(ours, theirs)), sep="\n")
    return ours, theirs


def test_ten_steps_without_dropout_have_the_lessons_losses() -> None:
    ours, theirs = curves(8, 10, 0.0, *NO_DROPOUT)
    assert largest_difference(ours, theirs) < 1e-4
    assert theirs[0] < 3 and max(theirs) > 10  # at this rate the loss climbs, which amplifies any difference


def test_dropout_has_the_lessons_positions_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def bernoulli(key: jax.Array, p: Any = 0.5, shape: Any = None, out_sharding: Any = None) -> jax.Array:
        """The same mask for every key, symmetric in the first two dimensions, of which either may come first."""
        first, second, *rest = np.indices(shape)
        number = 7 * (first + second) + sum(factor * index for factor, index in zip((13, 29), rest))
        return jnp.asarray(number % 100 < 100 * p)

    monkeypatch.setattr(jax.random, "bernoulli", bernoulli)  # theirs
    monkeypatch.setattr(layers, "random_mask", lambda key, share, shape, split: bernoulli(key, share, shape))
    ours, theirs = curves(8, 3, DROPOUT)
    assert largest_difference(ours, theirs) < 2e-5  # the exact GELU is 1.5e-4 away


@pytest.mark.slow
def test_with_the_lessons_rate_and_dropout_the_loss_climbs_to_about_twenty_in_both() -> None:
    ours, theirs = curves(32, 18, DROPOUT)
    for losses in (ours, theirs):
        assert losses[0] == pytest.approx(2.5, abs=0.3)
        assert 15 < max(losses) < 35
    assert np.mean(ours[5:]) == pytest.approx(np.mean(theirs[5:]), rel=0.35)  # each has dropout masks of its own
