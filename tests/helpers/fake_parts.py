"""Parts of a GPU visit that end in every way a part can end."""

import os
import shutil
import subprocess
import time
from pathlib import Path

from visit.job import Skipped


def works(job):
    job.keep(answer=job.arguments["number"])
    job.check("two is two", True, "2")


def is_a_gpu(job):
    job.keep(platform="gpu", device_kind="NVIDIA X")


def aborts(job):
    job.keep(before=1)
    os.abort()


def raises(job):
    job.keep(before=1)
    raise ValueError("no such thing")


def hangs(job):
    child = subprocess.Popen(["sleep", "600"])
    job.keep(processes=[os.getpid(), child.pid])
    time.sleep(600)


def vanishes(job):
    os._exit(0)


def removes(job):
    """A folder of the visit's own."""
    shutil.rmtree(getattr(job, job.arguments["folder"]))


def skips(job):
    raise Skipped("nothing to run on")


def is_wrong(job):
    job.keep(before=1)
    job.check("two is three", False, "2 of 3")


def compiles(job):
    """Fills the cache of compiled programs with files of so many bytes, in a folder each."""
    cache = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).parent
    for name, size in job.arguments["files"].items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(os.urandom(size))


def finds(job):
    """Keeps what is in that cache."""
    cache = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).parent
    job.keep(files=sorted(str(one.relative_to(cache)) for one in cache.rglob("*") if one.is_file()))


def compiles_with_jax(job):
    """Keeps how many programs jax found in that cache, and how many it did not."""
    import jax

    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x @ x + 1).lower(jax.ShapeDtypeStruct((8, 8), "float32")).compile()
    names = ("cache_hits", "cache_misses")
    job.keep(**{name: events.count(f"/jax/compilation_cache/{name}") for name in names})
