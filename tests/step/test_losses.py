"""Losses of extreme numbers and of a split batch, and top-k correctness; `test_update.py` holds their formulas."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vit_dist.mesh import layout
from vit_dist.step import losses

RNG = np.random.default_rng(0)
LOGITS: Any = 3 * RNG.normal(size=(16, 7)).astype(np.float32)
LABELS: Any = RNG.integers(0, 7, 16)
TARGETS: Any = RNG.dirichlet(np.ones(7), 16).astype(np.float32)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_are_float32_and_finite_for_huge_bfloat16_logits(name: str) -> None:
    logits = jnp.asarray([[1e4, -1e4], [-1e4, 1e4]], jnp.bfloat16)
    loss = losses.LOSSES[name](logits, losses.one_hot(jnp.asarray([0, 0]), 2))
    assert loss.dtype == jnp.float32 and loss.shape == (2,)
    assert loss[0] == 0 and np.isclose(loss[1], 2e4, rtol=5e-3)


def test_a_label_outside_the_classes_has_no_target_and_is_never_correct() -> None:
    np.testing.assert_array_equal(losses.one_hot(jnp.asarray([-1, 4, 1]), 4), [[0] * 4, [0] * 4, [0, 1, 0, 0]])
    assert losses.top_k_correct(jnp.zeros((3, 4)), jnp.asarray([-1, 4, 1]), 9).tolist() == [False, False, True]


@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_top_k_is_membership_in_the_k_largest(k: int) -> None:
    expected = [label in np.argsort(-row)[:k] for row, label in zip(LOGITS, LABELS, strict=True)]
    assert losses.top_k_correct(LOGITS, LABELS, k).tolist() == expected
    assert 0 < sum(expected) <= 16 and (k < 7) == (sum(expected) < 16)


def test_ties_go_to_the_lower_class_and_a_nan_is_wrong() -> None:
    tied = jnp.zeros((4, 4))
    for k in (1, 2, 3, 4):
        assert losses.top_k_correct(tied, jnp.arange(4), k).tolist() == [label < k for label in range(4)]
    rows = jnp.asarray([[jnp.nan] * 3, [5, jnp.nan, 0], [jnp.inf, 0, 0], [0, -jnp.inf, 0]])
    assert losses.top_k_correct(rows, jnp.asarray([0, 0, 0, 1]), 1).tolist() == [False, False, True, False]
    assert losses.top_k_correct(rows, jnp.asarray([0, 0, 0, 1]), 3).tolist() == [False, False, True, True]


def test_a_batch_split_over_a_mesh_gives_the_same_and_stays_split() -> None:
    def everything(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
        targets = losses.smooth(losses.one_hot(labels, 7), 0.1)
        correct = [losses.top_k_correct(logits, labels, k) for k in (1, 5)]
        gradient = jax.grad(lambda x: losses.softmax(x, targets).sum())(logits)
        return losses.softmax(logits, targets), losses.sigmoid(logits, targets), gradient, *correct

    on_one_device = jax.jit(everything)(LOGITS, LABELS)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, layout.spec("batch") or PartitionSpec())
        split = jax.jit(everything)(jax.device_put(LOGITS, rows), jax.device_put(LABELS, rows))
    for expected, array in zip(on_one_device, split, strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-6)
        assert array.sharding.spec[0] == ("data", "fsdp")
