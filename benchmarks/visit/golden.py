"""Twenty float32 steps whose rows were written on a CPU: does the same run come out on this device?

Everything random that a step can have is on, and the data travel with the rows. Matrix products run in float32 proper
(`highest`) for the comparison that must hold, and as the device likes (TF32 on NVIDIA's) for the figure beside it.
"""

import contextlib
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from visit.job import Job
from vit_dist import config
from vit_dist.data.stream.pixels import augments_on_device
from vit_dist.evaluate import open_split
from vit_dist.job import processes
from vit_dist.mesh.feed import Prefetch
from vit_dist.program import Program

STEPS, BATCH, CLASSES, SIZE = 20, 64, 10, 32
COMPARED = ("loss", "grad_norm", "param_norm")
CLOSE = 1e-4  # two versions of jax, or of its CPU compiler's effort, differ by 5e-7 in the loss
DATA, ROWS = "golden.npz", "golden.json"


def run(job: Job) -> None:
    """Keeps the largest relative differences to the kit's rows, in float32 proper and as the device likes."""
    job.device()
    expected = json.loads(job.kit_file(ROWS).read_text())
    job.keep(rows_made_with=f"jax {expected['jax']} on a CPU")
    for name, precision in (("highest", "highest"), ("default", None)):
        found = rows(job.kit_file(DATA), precision)
        worst = differences(found, expected["rows"])
        job.keep(**{name: {"differences": worst, "loss": [one["loss"] for one in found]}})
        if precision is not None:
            same = [one["examples"] for one in found] == [one["examples"] for one in expected["rows"]]
            job.check("every step saw the same examples", same, f"{len(found)} steps")
            for measure in COMPARED:
                claim = f"{measure} of {STEPS} float32 steps is the CPU's"
                job.check(claim, worst[measure] <= CLOSE, f"relative difference {worst[measure]:.1e}")


def write(folder: Path) -> None:
    """Writes the data and the rows of this device, a CPU, for the kit."""
    write_data(folder / DATA)
    found = {"jax": jax.__version__, "rows": rows(folder / DATA, "highest")}
    (folder / ROWS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def settings(data: Path) -> config.Config:
    """The run: a ViT of 17 tokens, width 128 and 4 blocks on the images in `data`, on one device."""
    values: dict[str, Any] = {
        "total_steps": STEPS,
        "batch_size": BATCH,
        "label_smoothing": 0.1,
        "mixup": 0.2,
        "cutmix": 0.5,
        "ema_decay": 0.99,
        "log_examples": True,
        "mesh": {"data": 1},
        "model": {
            "width": 128,
            "depth": 4,
            "mlp": 256,
            "heads": 4,
            "image_size": SIZE,
            "patch_size": 8,
            "num_classes": CLASSES,
            "dropout": 0.1,
            "embedding_dropout": 0.1,
            "drop_path": 0.1,
            "head_zero_init": False,  # or the first step's gradient would end at the head
        },
        "data": {"source": "npz", "path": str(data), "flip": True, "crop_area": (0.5, 1.0), "rotate": 10.0},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1, "warmup_steps": 5, "clip": 1.0},
    }
    return config.resolve(values)


def write_data(file: Path) -> None:
    """256 images that a model can learn to tell apart: a pattern for each of ten classes, and noise."""
    draw = np.random.default_rng(0)
    labels = np.arange(256, dtype=np.int32) % CLASSES
    patterns = draw.integers(0, 256, (CLASSES, SIZE // 4, SIZE // 4, 3))
    images = np.kron(patterns[labels], np.ones((1, 4, 4, 1), np.int64)) + draw.integers(-64, 65, (256, SIZE, SIZE, 3))
    np.savez_compressed(file, x_train=images.clip(0, 255).astype(np.uint8), y_train=labels)


def rows(data: Path, precision: str | None) -> list[dict[str, Any]]:
    """What the run's steps measure: loss, grad_norm, param_norm, and a digest of the examples' ids.

    precision: of float32 products, "highest"; None: the device's own default.
    """
    run = settings(data)
    source = open_split(run, "train")
    whole = augments_on_device(source, run.data)
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
        program = Program(run, classes=CLASSES, steps=STEPS, augment_on_device=whole, devices=jax.devices()[:1])
        host = program.training_batches(source, 0, STEPS)
        batches = Prefetch(host, program.mesh, BATCH, run.data.prefetch)
        with contextlib.closing(host), contextlib.closing(batches), program.in_use():
            state, found = program.new_state(), []
            for batch in batches:
                state, metrics = program.train_step(state, batch)
                values = jax.device_get(metrics)
                digest = hashlib.sha256(np.asarray(values["ids"], "<i4").tobytes()).hexdigest()[:16]
                found.append({**{name: float(values[name]) for name in COMPARED}, "examples": digest})
    return found


def differences(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, float]:
    """The largest relative difference of each measure over all steps; no number where one step's is none."""
    pairs = list(zip(found, expected, strict=True))
    return {
        name: float(np.max([abs(one[name] - other[name]) / abs(other[name]) for one, other in pairs]))
        for name in COMPARED
    }


if __name__ == "__main__":
    processes.make_fake_devices(1)
    write(Path(sys.argv[1]))
