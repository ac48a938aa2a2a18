"""The loader's rate on this machine's cores: photographs decoded, cropped and flipped, and prepared raw pixels.

The sides are those of `benchmarks/data.py`, Pillow among them, on one thread and on all cores. It needs no GPU, and a
visit of its own, for the other parts leave it no core to itself.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import data

from visit.job import Job, Skipped
from vit_dist.config import ConfigError
from vit_dist.data import libraries


def run(job: Job) -> None:
    """Keeps images/s and images a CPU second of every side, medians over the rounds so far."""
    photos, told, cores = job.kit_file("photos"), job.arguments, len(os.sched_getaffinity(0))
    try:
        for library in (libraries.cv2, libraries.simplejpeg):
            libraries.load(library)
    except ConfigError as missing:
        raise Skipped(str(missing)) from missing
    place = job.scratch / "loader"
    place.mkdir()
    job.keep(cores=cores, batch=data.BATCH, size=data.SIZE)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as worker:
        sides = list(data.photo_sides(photos, place, told["steps"], worker, max(2, cores), ("raw",)))
        for side in sides:
            if side.name.endswith("threads"):
                side.steps *= max(1, cores // 2)  # or a round of many threads would be too short
        data.compare(sides, told["rounds"], lambda: job.keep(rates=_rates(sides)))


def _rates(sides: list[data.Side]) -> dict[str, dict[str, float]]:
    return {
        side.name: {"images_per_second": side.rate(side.seconds), "a_cpu_second": side.rate(side.cpu_seconds)}
        for side in sides
    }
