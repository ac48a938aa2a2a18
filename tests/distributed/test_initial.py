"""Two processes start one run from weights of others; each reads what its own devices hold."""

import json

import golden_weights
import numpy as np
from golden_weights import fixture
from system import NOTHING_RANDOM, as_two, losses, rows, train_here

START = (
    *(f"model.{key}=null" for key in ("width", "depth", "mlp", "heads", "patch_size")),
    *("model.pool=cls", "model.position_std=0.02", "model.image_size=224", "total_steps=3", "log_every=1"),
    *("mesh.data=1", "mesh.fsdp=8", "mixup=0", "cutmix=0", *NOTHING_RANDOM),
)


def test_the_curve_of_two_processes_from_weights_is_that_of_one(tmp_path):
    weights = golden_weights.write(fixture("timm_vit_cls"), tmp_path / "timm").parent
    start = (*START, f"init.weights={weights}")
    first, second = as_two(tmp_path, *start)
    assert (first.wait(), second.wait()) == (0, 0), first.said()[-3000:] + second.said()[-3000:]
    alone = train_here(tmp_path / "alone", *start)
    np.testing.assert_allclose(losses(rows(tmp_path / "run")), losses(alone), rtol=1e-4)
    (session,) = json.loads((tmp_path / "run/environment.json").read_text())
    assert session["weights"]["family"] == "timm"
