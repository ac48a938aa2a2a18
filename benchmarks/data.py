"""Compares the speed of the loader with Pillow as torchvision's transforms use it, on the same images and crops.

    python benchmarks/data.py                          # on ../shared/data/photos
    python benchmarks/data.py --photos=DIR --quick     # shows that it runs; the figures mean nothing

Each side makes batches of 32 images of 224x224 by random resized crop (5 to 100 % of the area) and flip. Pillow reads
the files on the single thread of a worker process, as in torchvision (in this process it would be faster, because the C
library keeps memory that the loader has used). The loader reads the same files, and the records that `vit-dist prepare`
makes of them at a short side of 256 as JPEG and raw, on one thread and on two; and 28x28 pixels in memory. Rounds
alternate, so that other load of the machine affects all sides. A rate is a median over rounds, a ratio the median of
the ratios of single rounds. A CPU second counts the work of all threads, and depends less on other load. Results go to
stdout: the machine, a table, then one JSON object.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from vit_dist import config
from vit_dist.data.pictures import augment, crop
from vit_dist.data.prepare.convert import ImageOptions, prepare
from vit_dist.data.sets.examples import ArraySource, Source
from vit_dist.data.sets.sources import open_source
from vit_dist.data.stream.loader import train_batches
from vit_dist.data.stream.order import Order

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos"
SIZE, BATCH, SEED = 224, 32, 0
AREA, ASPECT = (0.05, 1.0), (3 / 4, 4 / 3)
IN_MEMORY_BATCHES = (128, 512, 4096)
_MORE = {"jpeg": 4, "raw": 10}  # steps for each step of the originals


@dataclasses.dataclass
class Side:
    """One way of making batches, and its measurements."""

    name: str
    make: Callable[[range], float]  # makes the batches of these steps; returns CPU seconds
    batch: int
    steps: int  # in a round
    seconds: list[float] = dataclasses.field(default_factory=list)  # of each round
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)

    def round(self, number: int) -> None:
        begun = time.perf_counter()
        self.cpu_seconds.append(self.make(range(number * self.steps, (number + 1) * self.steps)))
        self.seconds.append(time.perf_counter() - begun)

    def rate(self, seconds: list[float]) -> float:
        """Returns images per second."""
        return self.batch * self.steps / statistics.median(seconds)


def pillow(files: list[Path], steps: range) -> float:
    """Makes the batches of these steps by the same calls of Pillow as torchvision's loader and transforms.

    Crops and flips are the same as the loader's. Returns CPU seconds.
    """
    begun, order = time.process_time(), Order(SEED, (len(files),))
    for step in steps:
        batch, positions = [], step * BATCH + np.arange(BATCH)
        for index, position in zip(order.ids(positions), positions, strict=True):
            with files[index].open("rb") as stream:
                image = Image.open(stream).convert("RGB")
            rng = augment.generator(SEED, int(position))
            top, left, height, width = crop.random_crop(image.height, image.width, AREA, ASPECT, rng)
            image = image.crop((left, top, left + width, top + height))
            image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            batch.append(np.array(image))
        assert np.stack(batch).shape == (BATCH, SIZE, SIZE, 3)
    return time.process_time() - begun


def ours(source: Source, data: config.Data, batch: int, size: int, channels: int) -> Callable[[range], float]:
    """Returns a function that makes batches by the loader that training uses, including its start and end."""

    def make(steps: range) -> float:
        begun = time.process_time()
        with contextlib.closing(
            train_batches(
                source,
                data,
                image_size=(size, size),
                channels=channels,
                seed=SEED,
                batch_size=batch,
                rows=range(batch),
                start_step=steps.start,
                stop_step=steps.stop,
            )
        ) as batches:
            assert sum(len(made["id"]) for made in batches) == len(steps) * batch
        return time.process_time() - begun

    return make


def class_folder(photos: Path, parent: Path) -> list[Path]:
    """Makes a class folder of links to `photos`, `parent/train/<class>/<file>`; returns the links by id."""
    files = [file for file in sorted(photos.iterdir()) if file.suffix.lower() in (".jpeg", ".jpg")]
    links = []
    for file in files:
        folder = parent / "train" / file.name.partition("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        links.append(folder / file.name)
        links[-1].symlink_to(file.resolve())
    return links


def photo_sides(
    photos: Path,
    folder: Path,
    steps: int,
    worker: Executor,
    several: int = 2,
    encodings: Iterable[str] = ("jpeg", "raw"),
) -> Iterator[Side]:
    """Yields Pillow, and the loader on each form of the photos, on one thread and on `several`.

    Args:
      photos: a folder of JPEG files.
      folder: an empty folder to work in.
      steps: batches in a round; more for prepared records, so that a round takes as long.
      worker: the process that Pillow runs in.
      several: the other number of threads.
      encodings: of the prepared records.
    """
    files = class_folder(photos, folder / "photos")
    yield Side("pillow", lambda steps: worker.submit(pillow, files, steps).result(), BATCH, steps)
    sets = {"originals": (config.Data(source="folder", path=str(folder / "photos")), 1)}
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.nvimgcodec"):
        sets["originals, crop_decode"] = dataclasses.replace(sets["originals"][0], crop_decode=True), 1
    for encode in encodings:
        prepare(str(folder / "photos"), str(folder / encode), kind="folder", images=ImageOptions(256, encode))
        sets[f"prepared {encode} 256"] = config.Data(source="array_record", path=str(folder / encode)), _MORE[encode]
    for name, (data, more) in sets.items():
        data = dataclasses.replace(data, crop_area=AREA, crop_aspect=ASPECT, flip=True)
        source = open_source(data, "train")
        for threads in (1, several):
            made = ours(source, dataclasses.replace(data, threads=threads), BATCH, SIZE, 3)
            yield Side(f"{name}, {threads} thread{'s' if threads > 1 else ''}", made, BATCH, steps * more)


def in_memory_sides(examples: int) -> Iterator[Side]:
    """Yields the loader on 60,000 examples in memory, for each batch size; a round makes `examples` of them."""
    draw = np.random.default_rng(SEED)
    images = draw.integers(0, 256, (60_000, 28, 28, 1), np.uint8)
    source = ArraySource(images, draw.integers(0, 10, 60_000, np.int32), tuple("0123456789"))
    for batch in IN_MEMORY_BATCHES:
        made = ours(source, config.Data(), batch, 28, 1)
        yield Side(f"in memory, 28x28, batch {batch}", made, batch, max(1, examples // batch))


def compare(sides: list[Side], rounds: int, then: Callable[[], None] = lambda: None) -> None:
    """Warms up all sides, then runs the rounds in alternating order, and calls `then` after each round."""
    for side in sides:
        side.round(0)
        side.seconds.clear()
        side.cpu_seconds.clear()
    for number in range(1, rounds + 1):
        for side in sides if number % 2 else reversed(sides):
            side.round(number)
        then()


def ratio(side: Side, other: Side, cpu: bool = False) -> float:
    """Returns the speed of a side over that of another: the median of the ratios of single rounds."""
    pairs = zip(side.cpu_seconds, other.cpu_seconds) if cpu else zip(side.seconds, other.seconds)
    work = side.batch * side.steps / (other.batch * other.steps)
    return statistics.median(work * theirs / own for own, theirs in pairs)


def machine() -> dict[str, object]:
    """Describes the machine that the figures are of."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "pillow": Image.__version__,
    }


def print_results(sides: list[Side], described: dict[str, object]) -> None:
    """Prints the table and the JSON object."""
    peer, by_name = sides[0], {side.name: side for side in sides}
    results = {}
    print(f"{'':40}{'images/s':>14}{'a CPU second':>14}{'x pillow':>10}{'of CPU':>10}{'x 1 thread':>12}")
    for side in sides:
        photos = not side.name.startswith("in memory")
        single = by_name.get(side.name.replace("2 threads", "1 thread")) if side.name.endswith("threads") else None
        row = {
            "images_per_second": side.rate(side.seconds),
            "images_per_cpu_second": side.rate(side.cpu_seconds),
            "over_pillow": ratio(side, peer) if photos else None,
            "over_pillow_cpu": ratio(side, peer, cpu=True) if photos else None,
            "over_one_thread": ratio(side, single) if single else None,
        }
        results[side.name] = row
        shown = [f"{row['images_per_second']:14,.0f}", f"{row['images_per_cpu_second']:14,.0f}"]
        for name, wide in (("over_pillow", 10), ("over_pillow_cpu", 10), ("over_one_thread", 12)):
            shown.append(" " * wide if row[name] is None else f"{row[name]:{wide}.2f}")
        print(f"{side.name:40}" + "".join(shown).rstrip())
    print(json.dumps({**described, "results": results}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares the speed of the loader with Pillow as torchvision uses it.")
    parser.add_argument("--photos", type=Path, default=PHOTOS, help=f"a folder of JPEG files ({PHOTOS})")
    parser.add_argument("--steps", type=int, default=16, help="batches of 32 originals of each side in a round (16)")
    parser.add_argument("--rounds", type=int, default=9, help="how often the sides take turns (9)")
    parser.add_argument("--quick", action="store_true", help="one round of two batches: to see that it runs")
    options = parser.parse_args()
    steps, rounds, examples = (2, 1, 20_000) if options.quick else (options.steps, options.rounds, 500_000)
    if not options.photos.is_dir():
        sys.exit(f"error: --photos: {options.photos} does not exist; give a folder of JPEG files")
    described = machine()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, spawn) as worker:
        sides = [*photo_sides(options.photos, Path(folder), steps, worker), *in_memory_sides(examples)]
        print(", ".join(f"{name} {value}" for name, value in described.items()))
        compare(sides, rounds)
    print_results(sides, described)


if __name__ == "__main__":
    main()
