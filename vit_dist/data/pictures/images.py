"""Decodes an encoded image, or a box of it, to pixels `uint8 [H, W, C]`.

Nearly all images are JPEG, which the module `jpeg` decodes quickly. The raw pixels that `prepare` can write (binary PPM
and PGM) need no decoding. Pillow reads the rest: other formats, and JPEG that is CMYK, damaged or otherwise beyond
`jpeg`. If two of these can read a file, they give the same pixels.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageOps

from vit_dist.data.pictures import jpeg
from vit_dist.data.pictures.crop import Box
from vit_dist.data.pictures.resize import Interpolation, resize

CHANNELS = (1, 3)  # gray and RGB: what files are decoded to
MAX_PIXELS = 178_956_970  # Pillow's limit: a larger image is probably an attack or an accident
MAX_SIDE = 1_000_000  # pixels: for longer sides, libraries allocate tables much larger than the image, or fail
ChooseBox = Callable[[int, int], Box]  # an image's height and width -> a box of it
_RAW = re.compile(rb"P([56])\s([1-9]\d{0,8})\s([1-9]\d{0,8})\s255\s")  # a PGM or PPM without comments
_PILLOW_ERRORS = (  # raised by Pillow's decoders for damaged files
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# Pillow loads its formats at the first use, and while one thread loads them, other threads find none.
Image.init()
# What Pillow may open. It knows more: EPS, which it gives to Ghostscript; PDF and WMF; containers of scientific data.
_WANTED = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
_FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)  # a Pillow may be built without some


class BadImage(ValueError):
    """The bytes cannot be decoded to an image. The message gives the reason, without the file's name."""


def decode(data: bytes, channels: int) -> np.ndarray:
    """Decodes an image to what a viewer shows: upright, transparency on white, the first frame of an animation.

    Args:
      data: the encoded bytes.
      channels: 3 (RGB) or 1 (luma, ITU-R BT.601).

    Returns:
      `uint8 [H, W, channels]`; values of 16 bits are scaled to 8.

    Raises:
      BadImage: the bytes are empty, cut short, no image, or have more than `MAX_PIXELS` pixels or `MAX_SIDE` a side.
    """
    header = _jpeg_header(data, channels)
    image = None if header is None else jpeg.decode(data, header, channels)
    if image is None:
        image = convert_channels(_decode_slowly(data, channels), channels)
    return image if image.flags.writeable else image.copy()


def decode_box(
    data: bytes,
    channels: int,
    choose: ChooseBox,
    size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
    crop_decode: bool = False,
) -> np.ndarray:
    """Decodes a box of an image and resizes it, without decoding more of the image than necessary.

    The result is that of `decode` and `resize`, except for a box of a JPEG that shrinks by 2 or more, which is decoded
    at a smaller scale. On photographs it then differs by 2.5 grey levels in the mean with bilinear and 1.5 with bicubic
    (a box by up to 8.5, a single pixel by up to 74). With bilinear it is nearer to Pillow's result: 1.5 grey levels off
    in the mean, against 1.7 for `decode` and `resize`. The pixels depend on the bytes and the box alone.

    Args:
      data: the encoded bytes.
      channels: 3 (RGB) or 1 (luma).
      choose: is called once with the upright image's height and width, and returns the box.
      size: (height, width) of the result.
      interpolation: as in `resize`.
      crop_decode: decode only the box's rows and columns of a JPEG, which gives the same pixels in less time but does
        not notice damage outside the box.

    Returns:
      `uint8 [*size, channels]`.

    Raises:
      BadImage: as in `decode`.
    """
    header = _jpeg_header(data, channels)
    box = None
    if header is not None:
        box = choose(header.height, header.width)
        region = jpeg.decode_region(data, header, channels, box, size, crop_decode)
        if region is not None:
            pixels, box_in_pixels = region
            return _unshared(resize(pixels, size, interpolation, box_in_pixels), pixels)
    image = _decode_slowly(data, channels)
    if header is not None and image.shape[:2] != (header.height, header.width):
        raise BadImage(f"{image.shape[0]}x{image.shape[1]} pixels where its header says {header.height}x{header.width}")
    top, left, height, width = choose(*image.shape[:2]) if box is None else box
    crop = convert_channels(image[top : top + height, left : left + width], channels)
    return _unshared(resize(crop, size, interpolation), image)


def full_box(height: int, width: int) -> Box:
    """Returns the box that covers the image."""
    return 0, 0, height, width


def convertible(channels: int, wanted: int) -> bool:
    """Returns whether `convert_channels` can convert images of `channels` channels to `wanted`."""
    return channels in (1, wanted) or (channels, wanted) == (3, 1)


def convert_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Repeats gray, or converts RGB to the luma of `decode`: `uint8 [..., C]` -> `uint8 [..., channels]`."""
    if images.shape[-1] == channels:
        return images
    if images.shape[-1] == 1:
        return np.repeat(images, channels, axis=-1)
    assert convertible(images.shape[-1], channels)
    weights = np.array([19595, 38470, 7471], np.uint32)  # 0.299, 0.587, 0.114 in 1/65536
    return ((images @ weights + 32768) >> 16).astype(np.uint8)[..., None]


def _jpeg_header(data: bytes, channels: int) -> jpeg.Header | None:
    """Returns the header if the bytes are a JPEG that `jpeg` can decode. Raises `BadImage` as `decode`."""
    if channels not in CHANNELS:
        raise ValueError(f"images are decoded to 1 or 3 channels, not {channels}")
    if not data:
        raise BadImage("the file is empty")
    header = jpeg.read_header(data) if data[:2] == b"\xff\xd8" else None
    if header is not None:
        _check_size(header.height, header.width)
    return header


def _decode_slowly(data: bytes, channels: int) -> np.ndarray:
    """Decodes without `jpeg`. Raw pixels are not converted: they keep their channels and share the file's memory."""
    raw = _RAW.match(data)
    if raw is not None:
        kind, width, height = (int(number) for number in raw.groups())
        _check_size(height, width)
        depth = 3 if kind == 6 else 1
        size, expected = len(data) - raw.end(), height * width * depth
        if size < expected:
            raise BadImage(f"cut short: {size} of {expected} bytes of pixels")
        return np.frombuffer(data, np.uint8, expected, raw.end()).reshape(height, width, depth)
    try:
        return _decode_with_pillow(data, channels)
    except _PILLOW_ERRORS as error:
        reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise BadImage(reason or type(error).__name__) from error


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImage(f"{width}x{height} is more than {MAX_PIXELS} pixels")
    if max(height, width) > MAX_SIDE:
        raise BadImage(f"{width}x{height} has a side of more than {MAX_SIDE} pixels")


def _unshared(resized: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Returns the resized pixels, as a copy if they share the image's memory."""
    return resized.copy() if np.may_share_memory(resized, image) else resized


def _decode_with_pillow(data: bytes, channels: int) -> np.ndarray:
    image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    _check_size(image.height, image.width)
    if channels == 1:
        image.draft("L", None)  # a JPEG's stored luma, which `jpeg` returns too
    image.load()
    return _converted(image, channels)


def pixels_of(image: Image.Image, channels: int) -> np.ndarray:
    """Returns the pixels of an image that Pillow has opened, as `decode` returns them. Raises `BadImage`."""
    try:
        return _converted(image, channels)
    except _PILLOW_ERRORS as error:
        raise BadImage(str(error) or type(error).__name__) from error


def _converted(image: Image.Image, channels: int) -> np.ndarray:
    if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow assumes that all are stored inverted, as Adobe's are
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadImage(f"pixels of 32 bits (Pillow's mode {image.mode}) have no agreed white; save it with 8 or 16")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert("RGB" if channels == 3 else "L"))
    return pixels if channels == 3 else pixels[:, :, None]
