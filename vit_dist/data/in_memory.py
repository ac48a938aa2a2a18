"""A split whose files are decoded once, at the start, and kept as pixels (`data.in_memory`).

From then on a batch is one gather, a hundred times quicker than decoding; what it takes is memory, and images of one
size.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.data.examples import ArraySource, FileSource
from vit_dist.data.images import BadImage, decode
from vit_dist.data.progress import counted


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

    with ThreadPoolExecutor(threads) as pool:
        try:
            done = pool.map(store, range(len(source)))  # in order: the first odd file is the one that is named
            for _ in counted(done, f"decoding {source.where}", len(source)):
                pass
        except ConfigError:
            pool.shutdown(cancel_futures=True)
            raise
    return ArraySource(images, source.labels, source.class_names, source.parts)
