"""Decodes the files of a split once, at the start, and keeps them as pixels (`data.in_memory`).

A batch is then one gather, a hundred times faster than decoding. The price is memory, and all images must be of one
size.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.data.pictures.images import BadImage, decode
from vit_dist.data.progress_bar import counted
from vit_dist.data.sets.examples import ArraySource, FileSource

_CHUNK = 64  # images that a thread decodes at a time: a task for each image would take more memory than small images


def decode_all(source: FileSource, channels: int, limit: int, threads: int) -> ArraySource:
    """Decodes every image of a source into memory.

    Args:
      source: a split whose images are all of one size.
      channels: 1 (gray) or 3 (RGB).
      limit: bytes that the pixels may take.
      threads: how many threads decode.

    Returns:
      The same examples as pixels.

    Raises:
      ConfigError: if a file does not decode, an image differs in size from the first, or the pixels exceed `limit`.
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

    def decode_chunk(start: int) -> range:
        chunk = range(start, min(start + _CHUNK, len(source)))
        for index in chunk:
            image = load(index)
            if image.shape != shape:
                raise ConfigError(
                    f"{source.name(index)}: {image.shape[0]}x{image.shape[1]} pixels, but {source.name(0)} has "
                    f"{shape[0]}x{shape[1]}; data.in_memory needs images of one size, set it to False"
                )
            images[index] = image
        return chunk

    with ThreadPoolExecutor(threads) as pool:
        chunks = pool.map(decode_chunk, range(0, len(source), _CHUNK))  # in order, so the first bad file is named
        for _ in counted(itertools.chain.from_iterable(chunks), f"decoding {source.where}", len(source)):
            pass
    return ArraySource(images, source.labels, source.class_names, source.mixture, source.split)
