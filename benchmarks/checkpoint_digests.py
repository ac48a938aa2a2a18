"""What the digests of a checkpoint cost: `python benchmarks/checkpoint_digests.py [--variant=B/16] [--rounds=3]`.

Saves a training state with AdamW and a moving average, with digests and without, in turn, and reads it with `verify`
and without. `blocked` is how long the loop waits for `save`. Prints one JSON object; of each time, the median of
the rounds by the clock and in seconds of all cores (`cpu`), which say more on a busy machine.
"""

import argparse
import contextlib
import dataclasses
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from vit_dist import config
from vit_dist.program import Program
from vit_dist.run.checkpoints import Checkpoints
from vit_dist.run.state_digests import Pending, StateDigests


class NoDigests(StateDigests):
    """Computes none."""

    def start(self, trees: Any) -> Pending:
        return Pending({}, [])


class Times:
    """Times by name: seconds by the clock, and of all cores."""

    def __init__(self) -> None:
        self._taken: dict[str, list[tuple[float, float]]] = {}

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        clock, cpu = time.perf_counter(), _cpu()
        yield
        self._taken.setdefault(name, []).append((time.perf_counter() - clock, _cpu() - cpu))

    def medians(self) -> dict[str, dict[str, float]]:
        columns = {name: list(zip(*taken, strict=True)) for name, taken in self._taken.items()}
        return {
            name: {"seconds": round(statistics.median(clock), 4), "cpu": round(statistics.median(cpu), 4)}
            for name, (clock, cpu) in columns.items()
        }


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="B/16")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    values = config.default_config()
    values.total_steps, values.ema_decay = 1000, 0.99
    values.model.variant, values.model.num_classes = options.variant, 1000
    program = Program(config.resolve(values.to_dict()), classes=1000, steps=1000, augment_on_device=False)
    with program.in_use(), tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measured(program, Path(folder), options.rounds)))


def measured(program: Program, folder: Path, rounds: int) -> dict[str, Any]:
    state, times, digests = program.new_state(), Times(), StateDigests()
    trees = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    jax.block_until_ready(state)
    with times.of("digests, with their compilation"):
        digests.start(trees).each()
    for _ in range(rounds):
        with times.of("digests"):
            digests.start(trees).each()
    for number in range(rounds + 1):  # the first save compiles
        for kind, computed in (("with digests", digests), ("without", NoDigests())):
            checkpoints = Checkpoints(folder / kind)
            checkpoints._digests = computed
            ignored = Times()
            with (times if number else ignored).of(f"save complete, {kind}"):
                with (times if number else ignored).of(f"save blocked, {kind}"):
                    checkpoints.save(number, trees)
                checkpoints.close()
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), trees)
    for _ in range(rounds):
        for verify in (True, False):
            with times.of(f"read, verify={verify}"):
                read = Checkpoints(folder / "with digests", read_only=True, verify=verify).restore(wanted)[1]
                jax.block_until_ready(read)
    leaves = jax.tree.leaves(state)
    facts = {
        "device": jax.devices()[0].device_kind,
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "tensors": len(leaves),
    }
    return {**facts, "times": times.medians()}


if __name__ == "__main__":
    main()
