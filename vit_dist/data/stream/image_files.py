"""Image files that a user names one by one, by folder or by pattern: which they are, and their pixels, read ahead."""

import collections
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.data.files import read_file
from vit_dist.data.pictures.images import BadImage
from vit_dist.data.sets.formats.listing import is_hidden, is_image
from vit_dist.paths import expanded


def find_images(paths: Sequence[str | Path], key: str) -> list[Path]:
    """Returns the files that paths name, in their order; each path's own files are sorted.

    A folder stands for the images below it, at any depth, and a pattern such as `photos/**/*.jpg` for what it matches.
    Hidden files and those whose names are not of images are left out of folders only.

    Raises:
      ConfigError: names a path that does not exist, or that holds or matches nothing; `key` is what the user set.
    """
    found: list[Path] = []
    for given in paths:
        path = expanded(given, key)
        if path.is_dir():
            inside = _below(path)
            if not inside:
                raise ConfigError(f"{path}: holds no image files; give files that hold an image")
            found += inside
        elif path.exists():
            found.append(path)
        elif glob.has_magic(str(path)):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            matches = [image for match in matches for image in (_below(match) if match.is_dir() else [match])]
            if not matches:
                raise ConfigError(f"{path}: matches no file; give files that hold an image")
            found += dict.fromkeys(matches)  # a folder and what lies in it may both match
        else:
            raise ConfigError(f"{path}: No such file or directory; give files that hold an image")
    return found


def read_ahead(
    files: Sequence[Path], decode: Callable[[bytes], np.ndarray], *, threads: int, ahead: int
) -> Iterator[tuple[Path, np.ndarray | str]]:
    """Yields each file with its pixels, or with the reason why it has none, in order.

    Args:
      files: the files.
      decode: makes pixels of a file's bytes; raises `BadImage`.
      threads: how many read and decode at the same time.
      ahead: the most images that are held at a time.
    """

    def read(file: Path) -> np.ndarray | str:
        try:
            return decode(read_file(file))
        except OSError as error:
            return error.strerror or str(error)
        except BadImage as error:
            return str(error)

    waiting = collections.deque[tuple[Path, Future]]()
    rest = iter(files)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for file in rest:
                waiting.append((file, pool.submit(read, file)))
                if len(waiting) >= ahead:
                    first, pixels = waiting.popleft()
                    yield first, pixels.result()
            while waiting:
                first, pixels = waiting.popleft()
                yield first, pixels.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _below(folder: Path) -> list[Path]:
    """Returns the images below a folder, sorted, without those in hidden folders; links to folders are followed."""
    found, seen = list[Path](), set[Path]()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        folders[:] = [] if real in seen else [name for name in folders if not is_hidden(name)]
        if real not in seen:
            found += [Path(place, name) for name in files if is_image(name) and not is_hidden(name)]
        seen.add(real)
    return sorted(path for path in found if path.is_file())
