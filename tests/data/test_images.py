"""Bytes to pixels, for the images that occur in the wild."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vit_dist.data import images
from vit_dist.data.images import BadImage, center_crop_resize, convert_channels, decode, resize

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def _bytes(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _picture() -> Image.Image:
    """6 x 4, the left half red and the right half green."""
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3], pixels[:, 3:] = RED, GREEN
    return Image.fromarray(pixels)


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM"])
def test_lossless_formats_give_back_the_pixels(format: str) -> None:
    data = _bytes(_picture(), format, **({"lossless": True} if format == "WEBP" else {}))
    assert np.array_equal(decode(data, 3), np.asarray(_picture()))


def test_the_quick_way_gives_pillows_pixels(shared: Path) -> None:
    for file in sorted((shared / "photos").iterdir())[:6]:
        assert np.array_equal(decode(file.read_bytes(), 3), np.asarray(Image.open(file).convert("RGB"))), file


def test_gray_is_luma() -> None:
    gray = decode(_bytes(_picture(), "PNG"), 1)
    assert gray.shape == (4, 6, 1) and gray.dtype == np.uint8
    assert gray[0, 0, 0] == 76 and gray[0, 5, 0] == 150  # 0.299 and 0.587 of 255
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).resize((32, 32))
    of_jpeg = decode(_bytes(photo, "JPEG", quality=95), 1).astype(int)
    assert np.abs(of_jpeg - decode(_bytes(photo, "PNG"), 1)).mean() < 3


def test_gray_files_become_three_equal_channels() -> None:
    gray = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    for format in ("PNG", "JPEG"):
        pixels = decode(_bytes(gray, format), 3)
        assert pixels.shape == (4, 6, 3)
        assert np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2])


def test_cmyk_jpeg_has_the_colours_a_person_sees() -> None:
    pixels = decode(_bytes(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95), 3)
    assert np.abs(pixels.astype(int) - RED).max() < 8


def test_a_16_bit_png_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert decode(_bytes(Image.fromarray(values), "PNG"), 1)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert decode(_bytes(Image.fromarray(values), "PNG"), 3)[0, 3].tolist() == list(WHITE)


def test_32_bit_pixels_are_refused_by_name() -> None:
    with pytest.raises(BadImage, match="mode F"):
        decode(_bytes(Image.new("F", (4, 4), 0.5), "TIFF"), 3)


def test_transparent_parts_are_white() -> None:
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert decode(_bytes(image, "PNG"), 3)[0].tolist() == [list(RED), list(WHITE)]


def test_a_transparent_palette_colour_is_white() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    assert decode(_bytes(image, "PNG"), 3)[0].tolist() == [list(RED), list(GREEN)]
    assert decode(_bytes(image, "PNG", transparency=1), 3)[0].tolist() == [list(RED), list(WHITE)]


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_an_exif_turned_image_is_turned_upright(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter: the left half is on top
    pixels = decode(_bytes(_picture().resize((48, 32), Image.Resampling.NEAREST), format, exif=exif), 3)
    assert pixels.shape == (48, 32, 3)
    assert np.abs(pixels[4, 16].astype(int) - RED).max() < 8 and np.abs(pixels[44, 16].astype(int) - GREEN).max() < 8


def test_exif_without_a_turn_changes_nothing() -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    assert np.array_equal(decode(_bytes(_picture(), "JPEG", exif=exif), 3), decode(_bytes(_picture(), "JPEG"), 3))


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in (GREEN, RED)]
    data = _bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, 3).reshape(-1, 3).tolist() == [list(GREEN)] * 25


def test_a_jpeg_with_stray_bytes_still_decodes(encode: Callable[..., bytes]) -> None:
    data = encode(0, (32, 32), "JPEG")
    assert np.array_equal(decode(data + b"stray", 3), decode(data, 3))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_a_truncated_file_is_bad(encode: Callable[..., bytes], format: str) -> None:
    data = encode(1, (64, 64), format)
    for part in (0.5, 0.9):
        with pytest.raises(BadImage):
            decode(data[: int(len(data) * part)], 3)


def test_empty_files_and_text_are_bad() -> None:
    with pytest.raises(BadImage, match="empty"):
        decode(b"", 3)
    with pytest.raises(BadImage, match="no known image format"):
        decode(b"<html>404 not found</html>", 3)
    with pytest.raises(BadImage):
        decode(b"\xff\xd8\xff", 3)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it finds in them
def test_damaged_files_raise_bad_image_and_nothing_else(encode: Callable[..., bytes]) -> None:
    rng = np.random.default_rng(0)
    for i in range(600):
        data = bytearray(encode(0, (20, 30), ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")[i % 6]))
        for place in rng.integers(0, min(len(data), 200), 5):
            data[place] = rng.integers(256)
        try:
            assert decode(bytes(data), 3).shape[2] == 3
        except BadImage as error:
            assert str(error)


def test_too_many_pixels_are_bad_before_they_are_decoded() -> None:
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(BadImage, match="pixels"):
        decode(data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")), 3)


def test_the_pixel_limit_holds_for_jpeg(encode: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(BadImage, match="32x32 is more than 100 pixels"):
        decode(encode(0, (32, 32), "JPEG"), 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (3, 40), (40, 3), (20, 30), (25, 31), (60, 90), (1, 1)])
def test_resize_keeps_shape_type_and_brightness(size: tuple[int, int], channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, channels), np.uint8)
    resized = resize(image, size)
    assert resized.shape == (*size, channels) and resized.dtype == np.uint8
    assert abs(resized.mean() - image.mean()) < 12
    assert np.array_equal(resize(np.full_like(image, 77), size), np.full((*size, channels), 77))


def test_shrinking_does_not_alias() -> None:
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize(stripes, (64, 16)).astype(int) - 127.5).max() <= 1
    assert np.abs(resize(stripes, (100, 16)).astype(int) - 127.5).max() <= 1  # one side grows, the other shrinks


def test_whole_pixel_shrinking_is_the_mean() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    means = image.reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(resize(image, (4, 4)) - means).max() <= 0.5


def test_the_centre_crop_has_the_targets_shape() -> None:
    image = np.zeros((100, 300, 1), np.uint8)
    image[10:90, 110:190] = 255  # 80 x 80 in the middle
    assert center_crop_resize(image, (40, 40), 0.8).min() == 255
    assert center_crop_resize(image, (40, 40), 1.0).min() == 0
    wide = np.zeros((100, 300, 1), np.uint8)
    wide[:, 50:250] = 255  # 100 x 200
    assert center_crop_resize(wide, (10, 20), 1.0).min() == 255
    assert center_crop_resize(wide, (10, 21), 1.0).min() < 255


def test_channels_convert_as_decoding_does() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    data = _bytes(Image.fromarray(image), "PNG")
    assert np.array_equal(convert_channels(decode(data, 3), 1), decode(data, 1))
    assert np.array_equal(convert_channels(decode(data, 1), 3)[..., 2], decode(data, 1)[..., 0])
