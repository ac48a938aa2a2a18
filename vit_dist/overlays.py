"""Draws attention maps over their images, as PNG files in a new folder."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import matplotlib
import numpy as np
from PIL import Image

from vit_dist.config import ConfigError
from vit_dist.data.files import making
from vit_dist.paths import expanded

SIDE = 448  # pixels of a picture's long side, at least
_SHARE = 0.6  # of the map's colours in a pixel
_COLOURS = "inferno"
_NAME_BYTES = 200  # of an image's name in those of its maps; file systems allow 255, with number and kind


class Overlays:
    """A folder with NAME.rollout.png and NAME.last.png for each image, made when the context ends without an error.

    A map is scaled so that its largest value is the brightest colour, and 0 the darkest. The image below it is as the
    model sees it, cropped and resized, but gray, so that all colour is the map's. Until the end the pictures are in a
    folder beside it, so that some of them are not taken for all.
    """

    def __init__(self, folder: str | Path):
        """Raises `ConfigError` if the folder exists, or cannot be made."""
        self.folder = expanded(folder, "attention")
        if os.path.lexists(self.folder):
            raise ConfigError(f"attention: {self.folder}: exists; remove it or give another folder")
        if not self.folder.parent.is_dir():
            raise ConfigError(f"attention: {self.folder}: there is no folder {self.folder.parent}; make it first")
        self._work = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")
        self._taken = set[str]()

    def __enter__(self) -> Self:
        with making(self.folder):
            self._work.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._work.rename(self.folder)
        else:
            shutil.rmtree(self._work)

    def write(self, file: Path, pixels: np.ndarray, maps: Mapping[str, np.ndarray]) -> None:
        """Writes the maps [rows, columns] of an image, uint8 [H, W, C]; a second file of a name gets a number."""
        stem = os.fsdecode(os.fsencode(file.stem)[:_NAME_BYTES])
        name, number = stem, 1
        while name in self._taken:
            number += 1
            name = f"{stem}.{number}"
        self._taken.add(name)
        for kind, values in maps.items():
            Image.fromarray(overlaid(pixels, values)).save(self._work / f"{name}.{kind}.png")


def overlaid(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns an image, uint8 [H, W, C], in gray and at `SIDE` or more, under the colours of a map [rows, columns]."""
    height, width = pixels.shape[:2]
    factor = max(1, -(-SIDE // max(height, width)))
    size = width * factor, height * factor
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("L")
    gray = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32)[:, :, None]
    levels = (values / max(float(values.max()), np.finfo(np.float32).tiny)).astype(np.float32)
    smooth = np.clip(np.asarray(Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)), 0, 1)
    colours = matplotlib.colormaps[_COLOURS](smooth)[:, :, :3] * 255
    return np.round((1 - _SHARE) * gray + _SHARE * colours).astype(np.uint8)
