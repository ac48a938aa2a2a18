"""Decoding a JPEG by the module `jpeg`: orientation, and decoding only a box."""

import importlib.util
import io
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from vit_dist.data.libraries import simplejpeg
from vit_dist.data.pictures import jpeg
from vit_dist.data.pictures.images import BadImage, decode, decode_box
from vit_dist.data.pictures.resize import Box


def _jpeg(height: int, width: int, mode: str = "RGB", **options: Any) -> bytes:
    coarse = np.random.default_rng(height).integers(0, 256, (max(1, height // 6), max(1, width // 6), 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).convert(mode).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def _with_segments(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """Inserts application segments at the beginning of a file."""
    encoded = [struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments]
    return data[:2] + b"".join(encoded) + data[2:]


def _exif(order: str, orientation: int, before: int = 0, long: bool = False) -> bytes:
    """EXIF with so many other entries before the orientation, which is of 16 bits, or of 32."""
    entries = [struct.pack(f"{order}HHII", 0x0100 + number, 4, 1, 7) for number in range(before)]
    value = struct.pack(f"{order}I", orientation) if long else struct.pack(f"{order}HH", orientation, 0)
    entries.append(struct.pack(f"{order}HHI", 0x0112, 4 if long else 3, 1) + value)
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    return b"Exif\0\0" + start + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_orientation_is_read_from_any_position(order: str) -> None:
    data = _jpeg(20, 30)
    for before in (0, 3):
        exif = _exif(order, 6, before)
        for segments in (
            ((0xE1, exif),),
            ((0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"), (0xE2, b"x" * 60_000), (0xE1, exif)),
        ):
            assert jpeg.read_header(_with_segments(data, *segments)) == (30, 20, 6)
    assert jpeg.read_header(data) == (20, 30, 1)


_XMP = b"http://ns.adobe.com/xap/1.0/\0"


@pytest.mark.parametrize(
    ("name", "segments", "fill"),
    [
        ("16 bits", [_exif("<", 6)], b""),
        ("32 bits, low byte first", [_exif("<", 6, long=True)], b""),
        ("32 bits, high byte first", [_exif(">", 6, long=True)], b""),
        ("fill bytes", [_exif("<", 6)], b"\xff\xff\xff"),
        ("XMP, as an attribute", [_XMP + b'<x tiff:Orientation="6"/>'], b""),
        ("XMP, as an element", [_XMP + b"<tiff:Orientation>6</tiff:Orientation>"], b"\xff"),
        ("XMP before EXIF without it", [_XMP + b'<x tiff:Orientation="6"/>', b"Exif\0\0II*\0\x08" + bytes(9)], b""),
        ("EXIF, whatever XMP says", [_XMP + b'<x tiff:Orientation="3"/>', _exif("<", 6)], b""),
        ("EXIF in two segments", [_exif("<", 6, 2)[:30], b"Exif\0\0" + _exif("<", 6, 2)[30:]], b""),
        ("EXIF twice", [_exif("<", 6), _exif("<", 3)], b""),
    ],
)
def test_the_orientation_is_pillows(name: str, segments: list[bytes], fill: bytes) -> None:
    data = _with_segments(_jpeg(20, 30), *((0xE1, segment) for segment in segments))
    data = data[:2] + fill + data[2:]
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (20, 30), name
    assert jpeg.read_header(data) == (30, 20, 6), name
    for stray in (b"", b"stray"):  # which Pillow decodes
        assert np.array_equal(decode(data + stray, 3), decode(data, 3))


def test_damaged_exif_turns_nothing() -> None:
    data, exif = _jpeg(20, 30), _exif("<", 6, before=2)
    for body in (
        *(exif[:cut] for cut in range(6, len(exif) - 10)),
        b"Exif\0\0" + bytes(40),
        _exif(">", 9),
        _exif(">", 0),
    ):
        assert jpeg.read_header(_with_segments(data, (0xE1, body))) == (20, 30, 1)


def test_files_that_simplejpeg_cannot_read_are_left_to_pillow() -> None:
    data = _jpeg(20, 30)
    offset = data.index(b"\xff\xc0") + 11  # of the first colour's sampling: factors across and down
    for factors in (0x14, 0x33):
        assert jpeg.read_header(data[:offset] + bytes([factors]) + data[offset + 1 :]) is None
    assert jpeg.read_header(_jpeg(20, 30, "CMYK")) is None


needs_crop_decode = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.nvimgcodec") is None,
    reason="needs vit-dist[crop-decode]",
)


def _boxes(height: int, width: int, count: int) -> list[Box]:
    rng = np.random.default_rng(0)
    sizes = [(int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))) for _ in range(count)]
    return [(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w) for h, w in sizes]


@needs_crop_decode
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_crop_decoded_alone_has_the_same_pixels(mode: str, progressive: bool, subsampling: int) -> None:
    data = _jpeg(75, 101, mode, progressive=progressive, **({"subsampling": subsampling} if mode == "RGB" else {}))
    for orientation in (1, 4, 6):
        turned = _with_segments(data, (0xE1, _exif("<", orientation)))
        for number, box in enumerate(_boxes(101, 75, 20) if orientation == 6 else _boxes(75, 101, 20)):
            both = [
                decode_box(turned, (1, 3)[number % 2], lambda height, width: box, box[2:], crop_decode=crop)  # noqa: B023
                for crop in (False, True)
            ]
            assert np.array_equal(*both)


@needs_crop_decode
def test_only_a_crop_is_decoded_if_that_is_less_work(monkeypatch: pytest.MonkeyPatch) -> None:
    full_sizes, real = [], simplejpeg.decode_jpeg

    def decode_jpeg(*arguments: Any, **options: Any) -> np.ndarray:
        pixels = real(*arguments, **options)
        full_sizes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
    for box in ((3, 4, 60, 80), (0, 0, 72, 100), (0, 0, 70, 90)):
        decode_box(_jpeg(75, 101), 3, lambda height, width, box=box: box, (40, 50), crop_decode=True)
    assert full_sizes == [(75, 101), (75, 101)]  # the second and third are above 75 % of the area
    decode_box(_jpeg(75, 101), 3, lambda height, width: (3, 4, 60, 80), (30, 40), crop_decode=True)
    assert full_sizes[2:] == [(38, 51)]  # all of it at half the scale


@needs_crop_decode
def test_crops_are_decoded_alone_on_many_threads() -> None:
    data, boxes = _jpeg(75, 101), _boxes(75, 101, 200)

    def work(box: Box) -> bytes:
        return decode_box(data, 3, lambda height, width: box, (32, 32), crop_decode=True).tobytes()

    alone = [work(box) for box in boxes]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, boxes)) == alone


@needs_crop_decode
def test_a_file_cut_short_below_the_crop_is_bad() -> None:
    data = _jpeg(75, 101)
    with pytest.raises(BadImage):
        decode_box(data[: len(data) * 9 // 10], 3, lambda height, width: (0, 0, 8, 8), (8, 8), crop_decode=True)
