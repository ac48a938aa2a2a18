"""Decoding the images that occur in practice, by `decode` and by `decode_box`."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from vit_dist.data.libraries import simplejpeg
from vit_dist.data.pictures import images
from vit_dist.data.pictures.images import BadImage, convert_channels, decode, decode_box, full_box
from vit_dist.data.pictures.resize import Interpolation, resize

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def _bytes(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _seen(data: bytes, channels: int = 3) -> np.ndarray:
    """Returns the result of `decode`, which `decode_box` must give too for the full box at the image's own size."""
    pixels = decode(data, channels)
    sizes: list[tuple[int, int]] = []

    def choose(height: int, width: int) -> tuple[int, int, int, int]:
        sizes.append((height, width))
        return full_box(height, width)

    height, width, depth = pixels.shape
    assert np.array_equal(decode_box(data, channels, choose, (height, width)), pixels)
    assert sizes == [(height, width)] and depth == channels and pixels.dtype == np.uint8
    return pixels


def _refused(data: bytes, match: str | None = None) -> None:
    with pytest.raises(BadImage, match=match):
        decode(data, 3)
    with pytest.raises(BadImage, match=match):
        decode_box(data, 3, full_box, (8, 8))


def _picture() -> Image.Image:
    """6 x 4, the left half red and the right half green."""
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3], pixels[:, 3:] = RED, GREEN
    return Image.fromarray(pixels)


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM"])
def test_lossless_formats_give_back_the_pixels(format: str) -> None:
    data = _bytes(_picture(), format, **({"lossless": True} if format == "WEBP" else {}))
    assert np.array_equal(_seen(data), np.asarray(_picture()))


def test_a_jpeg_has_pillows_pixels(shared: Path) -> None:
    for file in sorted((shared / "photos").iterdir())[:6]:
        assert np.array_equal(_seen(file.read_bytes()), np.asarray(Image.open(file).convert("RGB"))), file


def test_gray_is_luma() -> None:
    gray = _seen(_bytes(_picture(), "PNG"), 1)
    assert gray.shape == (4, 6, 1) and gray.dtype == np.uint8
    assert gray[0, 0, 0] == 76 and gray[0, 5, 0] == 150  # 0.299 and 0.587 of 255
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).resize((32, 32))
    of_jpeg = _seen(_bytes(photo, "JPEG", quality=95), 1).astype(int)
    assert np.abs(of_jpeg - _seen(_bytes(photo, "PNG"), 1)).mean() < 3


def test_gray_files_become_three_equal_channels() -> None:
    gray = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    for format in ("PNG", "JPEG"):
        pixels = _seen(_bytes(gray, format))
        assert pixels.shape == (4, 6, 3)
        assert np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2])


def test_cmyk_jpeg_has_the_colours_a_person_sees() -> None:
    inverted = _bytes(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)  # as Adobe does, and says so
    assert np.abs(_seen(inverted).astype(int) - RED).max() < 8
    assert np.abs(_seen(inverted, 1).astype(int) - 76).max() < 8
    data = _bytes(Image.new("CMYK", (16, 16), (255, 0, 0, 255)), "JPEG", quality=95)
    adobe = data.index(b"\xff\xee")
    plain = data[:adobe] + data[adobe + 2 + int.from_bytes(data[adobe + 2 : adobe + 4]) :]  # without the mark
    assert b"Adobe" not in plain and np.abs(_seen(plain).astype(int) - RED).max() < 8


def test_a_16_bit_png_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert _seen(_bytes(Image.fromarray(values), "PNG"), 1)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert _seen(_bytes(Image.fromarray(values), "PNG"))[0, 3].tolist() == list(WHITE)


def test_a_16_bit_rgb_png_keeps_its_colours() -> None:
    row = struct.pack(">B6H", 0, 65535, 257 * 100, 0, 0, 257, 65535)  # an unfiltered row of two pixels
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b""))
    encoded = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    assert _seen(b"\x89PNG\r\n\x1a\n" + b"".join(encoded))[0].tolist() == [[255, 100, 0], [0, 1, 255]]


def test_32_bit_pixels_are_refused_by_name() -> None:
    _refused(_bytes(Image.new("F", (4, 4), 0.5), "TIFF"), "mode F")


def test_transparent_parts_are_white() -> None:
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert _seen(_bytes(image, "PNG"))[0].tolist() == [list(RED), list(WHITE)]


def test_a_transparent_palette_colour_is_white() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    assert _seen(_bytes(image, "PNG"))[0].tolist() == [list(RED), list(GREEN)]
    assert _seen(_bytes(image, "PNG", transparency=1))[0].tolist() == [list(RED), list(WHITE)]


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_an_exif_turned_image_is_turned_upright(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter: the left half is on top
    pixels = _seen(_bytes(_picture().resize((48, 32), Image.Resampling.NEAREST), format, exif=exif))
    assert pixels.shape == (48, 32, 3)
    assert np.abs(pixels[4, 16].astype(int) - RED).max() < 8 and np.abs(pixels[44, 16].astype(int) - GREEN).max() < 8


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_as_pillow_does(
    orientation: int, channels: int, encode: Callable[..., bytes]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = Image.open(io.BytesIO(encode(0, (37, 22), "PNG")))
    for format in ("JPEG", "PNG"):
        data = _bytes(plain, format, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if channels == 3 or format == "PNG":
            assert np.array_equal(
                _seen(data, channels)[..., -1],
                np.asarray(upright.convert("RGB" if channels == 3 else "L")).reshape(*upright.size[::-1], -1)[..., -1],
            )
        assert _seen(data, channels).shape[:2] == ((22, 37) if orientation > 4 else (37, 22))


def test_every_format_is_known_before_a_thread_asks() -> None:
    code = "from PIL import Image; from vit_dist.data.pictures import images; print(Image._initialized, *Image.OPEN)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {"2", "JPEG", "PNG", "WEBP", "TIFF"} <= set(output.split())  # 2: Pillow has nothing left to load


def test_exif_without_a_turn_changes_nothing() -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    assert np.array_equal(_seen(_bytes(_picture(), "JPEG", exif=exif)), _seen(_bytes(_picture(), "JPEG")))


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in (GREEN, RED)]
    data = _bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert _seen(data).reshape(-1, 3).tolist() == [list(GREEN)] * 25


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(1, 65_500), (65_500, 1), (65_500, 70)])
def test_a_thin_image_is_an_image(size: tuple[int, int], format: str, interpolation: Interpolation) -> None:
    data = _bytes(Image.new("RGB", size, (77, 77, 77)), format)
    assert np.array_equal(decode_box(data, 3, full_box, (32, 32), interpolation), np.full((32, 32, 3), 77))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "PPM", "GIF", "WEBP"])
def test_a_single_pixel_is_an_image(format: str) -> None:
    data = _bytes(Image.new("RGB", (1, 1), (200, 200, 200)), format)
    assert np.abs(_seen(data)[0, 0].astype(int) - 200).max() <= 2
    assert decode_box(data, 3, full_box, (4, 5)).shape == (4, 5, 3)


def test_a_jpeg_with_stray_bytes_still_decodes(encode: Callable[..., bytes]) -> None:
    data = encode(0, (32, 32), "JPEG")
    for channels in (1, 3):
        assert np.array_equal(_seen(data + b"stray", channels), _seen(data, channels))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_a_truncated_file_is_bad(encode: Callable[..., bytes], format: str) -> None:
    data = encode(1, (64, 64), format)
    for share in (0.5, 0.9):
        _refused(data[: int(len(data) * share)])


def test_empty_files_and_text_are_bad() -> None:
    _refused(b"", "empty")
    _refused(b"<html>404 not found</html>", "no known image format")
    _refused(b"\xff\xd8\xff")


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
0 0 8 8 rectfill
showpage
%%EOF
"""


def test_no_file_reaches_a_program_that_runs_what_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow opens EPS by Ghostscript; nor may it open others of its formats that are no pictures of today."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    assert Image.open(io.BytesIO(EPS)).format == "EPS"
    wmf = b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 8, 8, 96) + b"\0" * 6 + b"\1\0\t\0\0\3" + b"\0" * 50
    assert Image.open(io.BytesIO(wmf)).format == "WMF"
    fits = (
        b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80) + b"END".ljust(2720)
    )
    for data in (EPS, wmf, fits, b"%PDF-1.7\n%%EOF"):
        _refused(data, "no known image format")
    assert set(images._FORMATS).isdisjoint({"EPS", "PDF", "PS", "WMF", "EMF", "FITS", "HDF5", "GRIB", "BUFR"})


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it finds in them
def test_damaged_files_raise_bad_image_and_nothing_else(encode: Callable[..., bytes]) -> None:
    rng = np.random.default_rng(0)
    for i in range(600):
        data = bytearray(encode(0, (20, 30), ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")[i % 6]))
        for offset in rng.integers(0, min(len(data), 200), 5):
            data[offset] = rng.integers(256)
        try:
            assert _seen(bytes(data)).shape[2] == 3
        except BadImage as error:
            assert str(error)


def _claims(width: int, height: int, format: str) -> bytes:
    """A file of a few bytes whose header has this size."""
    small = _bytes(Image.new("RGB", (8, 8)), format)
    if format == "JPEG":
        offset = small.index(b"\xff\xc0") + 5
        return small[:offset] + struct.pack(">HH", height, width) + small[offset + 4 :]
    if format == "PPM":
        return small.replace(b"8 8", b"%d %d" % (width, height))
    header = b"IHDR" + struct.pack(">II", width, height) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(20_000, 20_000), (20_000, 10_000)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "PPM"])
def test_too_many_pixels_are_bad_before_they_are_decoded(
    size: tuple[int, int], format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(*_: Any, **__: Any) -> None:
        raise AssertionError("the bomb is being decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decoded)
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    monkeypatch.setattr(np, "frombuffer", decoded)
    _refused(_claims(*size, format), "pixels")


@pytest.mark.parametrize("size", [(1_000_001, 1), (1, 1_000_001)])
@pytest.mark.parametrize("format", ["PNG", "PPM"])
def test_too_long_a_side_is_bad_before_it_is_decoded(size: tuple[int, int], format: str) -> None:
    _refused(_claims(*size, format), "a side of more than 1000000 pixels")


def test_the_pixel_limit_holds_for_every_format(encode: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    for format in ("JPEG", "PNG", "PPM"):
        _refused(encode(0, (32, 32), format), "32x32 is more than 100 pixels")


def test_channels_convert_as_decoding_does() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    data = _bytes(Image.fromarray(image), "PNG")
    assert np.array_equal(convert_channels(_seen(data), 1), _seen(data, 1))
    assert np.array_equal(convert_channels(_seen(data, 1), 3)[..., 2], _seen(data, 1)[..., 0])


def test_raw_pixels_are_read_unchanged() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    colour, gray = b"P6\n7 5\n255\n" + image.tobytes(), b"P5 7 5 255\n" + image[..., 0].tobytes()
    assert np.array_equal(_seen(colour), image) and np.array_equal(_seen(gray, 1), image[..., :1])
    assert np.array_equal(_seen(colour, 1), convert_channels(image, 1))
    assert np.array_equal(_seen(gray, 3), np.repeat(image[..., :1], 3, axis=-1))
    assert np.array_equal(_seen(colour.replace(b"7 5", b"# a comment\n7 5")), image)  # by Pillow
    assert np.array_equal(_seen(colour + b"more"), image)
    _refused(colour[:-1], "cut short: 104 of 105 bytes")
    _refused(b"P6\n0 5\n255\n")


def test_results_have_memory_of_their_own(encode: Callable[..., bytes]) -> None:
    for data in (encode(0, (20, 30), "PPM"), encode(0, (20, 30), "JPEG"), encode(0, (20, 30), "PNG")):
        for size, channels in (((20, 30), 3), ((20, 30), 1), ((10, 10), 3)):
            boxed = decode_box(data, channels, full_box, size)
            assert boxed.flags.writeable and not np.may_share_memory(boxed, np.frombuffer(data, np.uint8))
            assert decode(data, channels).flags.writeable


def _photo(height: int, width: int, **options: Any) -> bytes:
    """A JPEG with detail at every scale, as photographs have."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3))
    for cells in (4, 16, 64, 256):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8)).resize((width, height))
        total += np.asarray(noise, float) / cells**0.75
    return _bytes(Image.fromarray((total * 255 / total.max()).astype(np.uint8)), "JPEG", quality=90, **options)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_a_box_is_decoded_then_cropped_and_resized(orientation: int, interpolation: Interpolation) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data, rng = _photo(243, 355, exif=exif), np.random.default_rng(orientation)
    image = decode(data, 3)
    for scale in (1, 2, 4, 8):
        for _ in range(4):
            size = (int(rng.integers(12, 17)), int(rng.integers(12, 17)))
            box_size = [int(scale * side * rng.uniform(1, 1.9)) for side in size]
            top, left = (
                int(rng.integers(side - box_side + 1))
                for side, box_side in zip(image.shape[:2], box_size, strict=False)
            )
            box = (top, left, *box_size)
            got = decode_box(data, 3, lambda height, width, box=box: box, size, interpolation).astype(int)
            error = np.abs(got - resize(image, size, interpolation, box))
            assert error.max() == 0 if scale == 1 else error.mean() < 3, (scale, box)


def test_a_large_box_is_decoded_at_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, real = [], simplejpeg.decode_jpeg

    def decode_jpeg(*arguments: Any, **options: Any) -> np.ndarray:
        pixels = real(*arguments, **options)
        decoded.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
    data = _photo(203, 301)
    for box, size in (
        ((0, 0, 203, 301), (102, 150)),
        ((10, 5, 160, 200), (80, 90)),
        ((0, 0, 203, 301), (50, 70)),
        ((3, 3, 200, 250), (25, 30)),
        ((0, 0, 203, 301), (2, 2)),
    ):
        decode_box(data, 3, lambda height, width, box=box: box, size)
    assert decoded == [(203, 301), (102, 151), (51, 76), (26, 38), (26, 38)]


def test_scaled_photos_are_about_as_near_to_pillows_as_unscaled_ones(shared: Path) -> None:
    errors = []
    for number, file in enumerate(sorted((shared / "photos").iterdir())[::4]):
        data = file.read_bytes()
        image = decode(data, 3)
        height, width = image.shape[:2]
        size = (height // (3 + number % 4), width // (3 + number % 4))  # decoded at 1/2 or 1/4
        peer = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
        scaled, unscaled = decode_box(data, 3, full_box, size), resize(image, size)
        errors.append(
            [np.abs(a - b).mean() for a, b in ((scaled, peer), (unscaled, peer), (scaled, unscaled.astype(int)))]
        )
    of_scaled, of_unscaled, between = np.mean(errors, axis=0)
    assert of_scaled < of_unscaled + 0.5 and between < 3, (of_scaled, of_unscaled, between)


def test_a_box_has_the_same_pixels_on_any_thread() -> None:
    files = [_photo(200, 300), _photo(97, 61), _bytes(_picture(), "PNG"), _bytes(_picture().resize((60, 40)), "PPM")]

    def work(number: int) -> bytes:
        rng = np.random.default_rng(number)

        def choose(height: int, width: int) -> tuple[int, int, int, int]:
            return 0, 0, int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))

        return decode_box(files[number % len(files)], 3, choose, (24, 24)).tobytes()

    alone = [work(number) for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(200))) == alone
