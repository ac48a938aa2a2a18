"""Small data sets that the tests make for themselves."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def shared() -> Path:
    """The folder of real images beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    return SHARED


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """`encode(number, size=(h, w), format=...)`: an image whose pixels depend on the number."""

    def encode(number: int, size: tuple[int, int] = (12, 10), format: str = "PNG") -> bytes:
        coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BILINEAR).save(file, format)
        return file.getvalue()

    return encode


@pytest.fixture
def image_set(tmp_path: Path, encode: Callable[..., bytes]) -> Path:
    """A folder of `train` (cat 5, dog 8) and `test` (cat 3, dog 4), its files written in no particular order."""
    root = tmp_path / "set"
    number = 0
    for split, counts in (("train", {"dog": 8, "cat": 5}), ("test", {"dog": 4, "cat": 3})):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for i in reversed(range(count)):
                (root / split / name / f"{i}.png").write_bytes(encode(number))
                number += 1
    return root


@pytest.fixture
def pack() -> Callable[..., Path]:
    """`pack(folder, file, inside="", mode="w")`: a tar of a folder's content, below `inside`."""

    def pack(folder: Path, file: Path, inside: str = "", mode: str = "w") -> Path:
        with tarfile.open(file, mode) as tar:  # type: ignore[call-overload]
            tar.add(folder, inside or ".")
        return file

    return pack
