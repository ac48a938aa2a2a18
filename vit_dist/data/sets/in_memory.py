"""A split whose files are decoded once, at the start, and kept as pixels (`data.in_memory`).

From then on a batch is one gather, a hundred times quicker than decoding; what it takes is memory, and images of one
size.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.data.pictures.images import BadImage, decode
from vit_dist.data.progress_bar import counted
from vit_dist.data.sets.examples import ArraySource, FileSource

_RUN = 64  # images that a thread decodes at a time: a task for each would take more memory than small images


def decode_all(source: FileSource, channels: int, limit: int, threads: int) -> ArraySource:
    """Decodes every image of a source into memory, on so many threads.

    Raises `ConfigError` for a file that does not decode, one not of the first one's size, or more than `limit` bytes.
    """

    def load(index: int) -> np.ndarray:
        try:
            return decode(source.read(index), channels)
        except (BadImage, OSError) as error:
            raise ConfigError(
                f"{source.name(index)}: {error}; repair or remove it, or set data.in_memory=False to skip it"
            ) from error

    shape = load(0).shape
    size = len(source) * int(np.prod(shape))
    if size > limit:
        raise ConfigError(
            f"data.in_memory: {source.where or 'data.mixture'} takes {size / 2**30:.3g} GiB as pixels, more than "
            f"data.memory_limit_gb={limit / 2**30:g}; raise it or set data.in_memory=False"
        )
    images = np.empty((len(source), *shape), np.uint8)

    def store(index: int) -> None:
        image = load(index)
        if image.shape != shape:
            raise ConfigError(
                f"{source.name(index)}: {image.shape[0]}x{image.shape[1]} pixels, but {source.name(0)} has "
                f"{shape[0]}x{shape[1]}; data.in_memory needs images of one size, set it to False"
            )
        images[index] = image

    def store_run(start: int) -> range:
        run = range(start, min(start + _RUN, len(source)))
        for index in run:
            store(index)
        return run

    with ThreadPoolExecutor(threads) as pool:
        runs = pool.map(store_run, range(0, len(source), _RUN))  # in order: the first odd file is the one that is named
        for _ in counted(itertools.chain.from_iterable(runs), f"decoding {source.where}", len(source)):
            pass
    return ArraySource(images, source.labels, source.class_names, source.parts, source.split)
