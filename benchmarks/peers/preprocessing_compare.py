"""Compares our preprocessing of photographs with that of timm, OpenCLIP and transformers: a table in Markdown.

    python benchmarks/peers/preprocessing_fixtures.py photos FOLDER OUT.npz      # where these libraries are installed
    python benchmarks/peers/preprocessing_compare.py FOLDER OUT.npz              # here

For each published way to prepare images: the largest difference of any pixel in grey levels, the share of pixels that
differ, and the time of ours, decoding included.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from vit_dist import config
from vit_dist.config import pair
from vit_dist.data.stream.pixels import evaluation_image
from vit_dist.weights import preprocessing


def main() -> None:
    folder, peers = Path(sys.argv[1]), np.load(sys.argv[2])
    configs = json.loads(str(peers["configs"]))
    print("| peer | photographs | largest difference | pixels that differ | ms a photograph |\n|---|---|---|---|---|")
    for name, values in configs.items():
        size, data = ours(name, values)
        largest, differ, total, seconds = 0.0, 0, 0, 0.0
        files = sorted(folder.iterdir())
        for file in files:
            encoded, start = file.read_bytes(), time.perf_counter()
            pixels = evaluation_image(encoded, data, size, 3)
            seconds += time.perf_counter() - start
            difference = np.abs(pixels.astype(np.float64) - peers[f"{name}|{file.name}"])
            largest = max(largest, float(difference.max()))
            differ, total = differ + int((difference > 0.5).sum()), total + difference.size
        share, ms = 100 * differ / total, 1000 * seconds / len(files)
        print(f"| {name} | {len(files)} | {largest:.2f} | {share:.2f} % | {ms:.1f} |")


def ours(name: str, values: dict[str, Any]) -> tuple[tuple[int, int], config.Data]:
    """Returns the image size and the keys of the peer's config."""
    if name.startswith("timm"):
        keys = preprocessing.from_timm(values, name)
    elif name.startswith("open_clip"):
        keys = preprocessing.from_open_clip(values, values["size"], name)
    else:
        keys = preprocessing.from_transformers(values, name)
    data = {key.removeprefix("data."): value for key, value in keys.items() if key.startswith("data.")}
    return pair(keys["model.image_size"]), config.Data(**data)


if __name__ == "__main__":
    main()
