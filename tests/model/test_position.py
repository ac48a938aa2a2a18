"""Fixed positions against a definition written out number by number."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from vit_dist.model.position import sincos2d


@pytest.mark.parametrize(("rows", "columns", "width"), [(3, 3, 16), (2, 5, 8), (4, 1, 4)])
def test_sincos2d_is_sin_x_cos_x_sin_y_cos_y_at_geometric_wave_numbers(rows: int, columns: int, width: int) -> None:
    quarter = width // 4
    waves = [10_000 ** -(i / (quarter - 1)) if i else 1.0 for i in range(quarter)]
    expected = [
        [f(side * wave) for side, f in ((x, math.sin), (x, math.cos), (y, math.sin), (y, math.cos)) for wave in waves]
        for y in range(rows)  # patches go row by row
        for x in range(columns)
    ]
    np.testing.assert_allclose(sincos2d(rows, columns, width), expected, atol=1e-6)


def test_every_two_positions_have_distinct_embeddings() -> None:
    table = np.asarray(sincos2d(14, 14, 64))
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1) + 10 * np.eye(196)
    assert distances.min() > 0.5
    np.testing.assert_allclose(np.linalg.norm(table, axis=1), math.sqrt(32), rtol=1e-5)  # sin^2 + cos^2 = 1, 32 times
    assert table.dtype == jnp.float32
