"""The training steps of a visit, planned for a GPU that is not here: what `visit_kit.py` sends along.

    PYTHONPATH=.cache/compilers:benchmarks:. python -m visit.plans h100:1

prints one JSON object: the plans by the name of their part. `cpu:1` plans the tiny steps of a dry run.
"""

import json
import sys

import jax

from visit import models
from visit.parts import planned
from vit_dist.plan.verb import plan

_KEPT = ("device_kind", "peak_bytes", "device_bytes", "memory", "step_ms", "images_per_second", "mfu", "binds")


def main(target: str) -> None:
    """Plans the step of each part that times one of ours."""
    found = {}
    for part in planned():
        told = part.sizes(dry_run=target.startswith("cpu:"))
        settings = models.settings(told["model"], told["batch"], told["image"], told["scan"])
        made = plan(settings, target)
        found[part.name] = {name: made[name] for name in _KEPT} | {"target": target, "jax": jax.__version__}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
