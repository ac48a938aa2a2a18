"""One process of a job that compiles the training step for all devices of the job, and prints what a device sends.

    python scaling.py, with the environment variables of the job

Prints one JSON object: `processes`, `devices`, and `collectives`, each with its kind, axes, bytes and loops. Weak
scaling: every device has the same number of rows of the batch, whatever the number of devices.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import jax  # noqa: E402
from compiled import program_on, step_collectives  # noqa: E402
from system import NO_AUGMENTATION, NO_DROPOUT  # noqa: E402

from vit_dist.job import processes  # noqa: E402

ROWS = 16  # rows of the batch on each device

if __name__ == "__main__":
    processes.start(fake_devices=2)
    devices = jax.device_count()
    program = program_on(
        {"data": devices}, f"batch_size={ROWS * devices}", "log_examples=false", *NO_DROPOUT, *NO_AUGMENTATION
    )
    collectives = [dataclasses.asdict(collective) for collective in step_collectives(program)]
    print(json.dumps({"processes": jax.process_count(), "devices": devices, "collectives": collectives}), flush=True)
    processes.leave(0, "", together=True)
