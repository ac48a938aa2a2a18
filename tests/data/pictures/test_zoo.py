"""A folder of unusual files: each is decoded to what a viewer shows, or is bad and named."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_dist.config import ConfigError, Data
from vit_dist.data.sets.examples import Source
from vit_dist.data.sets.sources import open_source
from vit_dist.data.stream.loader import evaluation_batches, train_batches

BAD = {"bomb.png": "decompression bomb", "cut.jpg": "", "empty.jpg": "the file is empty", "text.jpg": "no known"}
# The colours of the upper left and the lower right corner of each good file.
GOOD = {
    "animated.gif": ((255, 0, 0), (255, 0, 0)),  # the first frame
    "cmyk.jpg": ((0, 0, 255), (0, 0, 255)),
    "deep.png": ((128, 128, 128), (128, 128, 128)),  # 16 bits
    "one.png": ((10, 20, 30), (10, 20, 30)),  # 1x1
    "turned.jpg": ((255, 255, 255), (0, 0, 0)),  # stored with its black end on the left, to be turned by half
}


def bomb() -> bytes:
    """A valid PNG of 20,000 x 20,000 black pixels in 50 kB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    side, packed, row = 20_000, zlib.compressobj(9), bytes(1 + 20_000 // 8)
    pixels = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zoo")
    folder = root / "train/animals"
    folder.mkdir(parents=True)
    complete = io.BytesIO()
    Image.new("RGB", (64, 64), "green").save(complete, "JPEG")
    (folder / "cut.jpg").write_bytes(complete.getvalue()[:-200])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("<html>not found</html>")
    (folder / "bomb.png").write_bytes(bomb())
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    # Adobe's mark, which Photoshop writes, says that the inks are stored inverted; Pillow writes and reads it so
    Image.new("CMYK", (32, 32), (255, 255, 0, 0)).save(folder / "cmyk.jpg", quality=95)
    Image.fromarray(np.full((16, 16), 128 * 257, np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (1, 1), (10, 20, 30)).save(folder / "one.png")
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(half).save(folder / "turned.jpg", exif=exif, quality=95)
    return root


def opened(zoo: Path) -> Source:
    return open_source(Data(source="folder", path=str(zoo)), "train")


def test_good_files_are_what_a_viewer_shows_and_bad_files_are_skipped_and_named(zoo: Path) -> None:
    source, names = opened(zoo), sorted([*BAD, *GOOD])
    data = Data(on_bad="skip", threads=2)
    batches = evaluation_batches(source, data, image_size=(8, 8), channels=3, batch_size=9, rows=range(9))
    (batch,) = list(batches)
    assert {bad.name for bad in batches.bad()} == {f"{zoo}/train/animals/{name}" for name in BAD}
    for bad in batches.bad():
        assert BAD[bad.name.rpartition("/")[2]] in bad.reason and names[bad.id] == bad.name.rpartition("/")[2]
    assert batch["mask"].tolist() == [name in GOOD for name in names]
    for name, (first, last) in GOOD.items():
        image = batch["image"][names.index(name)].astype(int)
        assert np.abs(image[0, 0] - first).max() <= 4 and np.abs(image[-1, -1] - last).max() <= 4, name


def test_training_replaces_a_bad_file_by_the_next_good_one(zoo: Path) -> None:
    source, names = opened(zoo), sorted([*BAD, *GOOD])
    data = Data(on_bad="skip", max_bad_fraction=0.5, threads=2, crop_area=(0.2, 1.0), flip=True)
    keys = {"image_size": (8, 8), "channels": 3, "seed": 0, "batch_size": 9, "rows": range(9)}
    (batch,) = list(train_batches(source, data, start_step=0, stop_step=1, **keys))  # type: ignore[arg-type]
    stands_in = {name: next(other for other in [*names[i:], *names] if other in GOOD) for i, name in enumerate(names)}
    assert sorted(names[number] for number in batch["id"]) == sorted(stands_in.values())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_that_may_not_be_skipped_is_an_error_that_names_it(zoo: Path, name: str, tmp_path: Path) -> None:
    (tmp_path / "train/animals").mkdir(parents=True)
    (tmp_path / "train/animals" / name).symlink_to(zoo / "train/animals" / name)
    keys = {"image_size": (8, 8), "channels": 3, "seed": 0, "batch_size": 1, "rows": range(1)}
    with pytest.raises(ConfigError, match=f"train/animals/{name}: .*{BAD[name]}.*set data.on_bad=skip"):
        list(train_batches(opened(tmp_path), Data(), start_step=0, stop_step=1, **keys))  # type: ignore[arg-type]
