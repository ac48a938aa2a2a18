"""Encoded bytes -> pixels, of the whole image or of a box of it, as uint8 `[H, W, C]`.

JPEG, which is nearly all there is, takes the quick way (`jpeg`), and the raw pixels that `prepare` can write (binary
PPM and PGM) need no decoding. Pillow reads the rest and whatever the quick way refuses: other formats, CMYK, damaged
files. Where two of them can read a file they give the same pixels.
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
MAX_PIXELS = 178_956_970  # as Pillow: more is taken for an attack or an accident
MAX_SIDE = 1_000_000  # pixels: of longer rows, libraries keep tables much larger than the image, or fail
Choose = Callable[[int, int], Box]  # an image's height and width -> a box of it
_RAW = re.compile(rb"P([56])\s([1-9]\d{0,8})\s([1-9]\d{0,8})\s255\s")  # a PGM or PPM without comments
_PILLOW_ERRORS = (  # what its decoders raise on damaged files
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

# Pillow loads its formats when it first needs them, and a thread that looks while another loads them finds none.
Image.init()


class BadImage(ValueError):
    """The bytes are no image that can be shown; the message says why, without the file's name."""


def decode(data: bytes, channels: int) -> np.ndarray:
    """The picture a person sees, `uint8 [H, W, channels]`; `channels` is 3 (RGB) or 1 (luma, ITU-R BT.601).

    Turned as EXIF says, transparent parts on white, 16 bits brought to 8, the first frame of an animation. Raises
    `BadImage` for bytes that are empty, cut short, no image, or of more than `MAX_PIXELS` pixels or `MAX_SIDE` a side.
    """
    header = _jpeg_header(data, channels)
    image = None if header is None else jpeg.decode(data, header, channels)
    if image is None:
        image = convert_channels(_decode_otherwise(data, channels), channels)
    return image if image.flags.writeable else image.copy()


def decode_box(
    data: bytes,
    channels: int,
    choose: Choose,
    size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
    crop_decode: bool = False,
) -> np.ndarray:
    """The box of the picture that `choose(height, width)` gives, brought to `size`: `uint8 [*size, channels]`.

    As `decode` and `resize`, but no more is decoded than it takes. So a box of a JPEG that shrinks by 2 or more differs
    from theirs: on photographs by 2.5 grey levels in the mean with bilinear and 1.5 with bicubic (a box by up to 8.5, a
    single pixel by up to 74). With bilinear it is the nearer one to Pillow's: 1.5 in the mean, where theirs is 1.7 off.
    The pixels depend on the bytes and the box alone. `crop_decode` gives the same ones sooner; see `jpeg.decode_part`
    for what it overlooks. `choose` is called once. Raises `BadImage` as `decode`.
    """
    header = _jpeg_header(data, channels)
    box = None
    if header is not None:
        box = choose(header.height, header.width)
        part = jpeg.decode_part(data, header, channels, box, size, crop_decode)
        if part is not None:
            return _own(resize(part[0], size, interpolation, part[1]), part[0])
    image = _decode_otherwise(data, channels)
    if header is not None and image.shape[:2] != (header.height, header.width):
        raise BadImage(f"{image.shape[0]}x{image.shape[1]} pixels where its header says {header.height}x{header.width}")
    top, left, height, width = choose(*image.shape[:2]) if box is None else box
    crop = convert_channels(image[top : top + height, left : left + width], channels)
    return _own(resize(crop, size, interpolation), image)


def whole(height: int, width: int) -> Box:
    """The box that is all of the image."""
    return 0, 0, height, width


def convertible(channels: int, wanted: int) -> bool:
    """Whether `convert_channels` can turn images of `channels` into images of `wanted`."""
    return channels in (1, wanted) or (channels, wanted) == (3, 1)


def convert_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """`uint8 [..., C]` -> `uint8 [..., channels]`: gray repeated, or RGB to luma (as `decode` has it)."""
    if images.shape[-1] == channels:
        return images
    if images.shape[-1] == 1:
        return np.repeat(images, channels, axis=-1)
    assert convertible(images.shape[-1], channels)
    weights = np.array([19595, 38470, 7471], np.uint32)  # 0.299, 0.587, 0.114 in 1/65536
    return ((images @ weights + 32768) >> 16).astype(np.uint8)[..., None]


def _jpeg_header(data: bytes, channels: int) -> jpeg.Header | None:
    """What the quick way reads, if it can read this."""
    if channels not in CHANNELS:
        raise ValueError(f"images are decoded to 1 or 3 channels, not {channels}")
    if not data:
        raise BadImage("the file is empty")
    header = jpeg.read_header(data) if data[:2] == b"\xff\xd8" else None
    if header is not None:
        _check_size(header.height, header.width)
    return header


def _decode_otherwise(data: bytes, channels: int) -> np.ndarray:
    """Without the quick way for JPEG. Raw pixels come as they are: of their own channels, in the file's memory."""
    raw = _RAW.match(data)
    if raw is not None:
        kind, width, height = (int(number) for number in raw.groups())
        _check_size(height, width)
        depth = 3 if kind == 6 else 1
        found, wanted = len(data) - raw.end(), height * width * depth
        if found < wanted:
            raise BadImage(f"cut short: {found} of {wanted} bytes of pixels")
        return np.frombuffer(data, np.uint8, wanted, raw.end()).reshape(height, width, depth)
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


def _own(resized: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The resized pixels in memory of their own, not the image's or the file's."""
    return resized.copy() if np.may_share_memory(resized, image) else resized


def _decode_with_pillow(data: bytes, channels: int) -> np.ndarray:
    image: Image.Image = Image.open(io.BytesIO(data))
    _check_size(image.height, image.width)
    if channels == 1:
        image.draft("L", None)  # of a JPEG its luma as it is stored, as the quick way has it
    image.load()
    if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes all to be inverted, as Adobe's are
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadImage(f"pixels of 32 bits (Pillow's mode {image.mode}) have no agreed white; save it with 8 or 16")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert("RGB" if channels == 3 else "L"))
    return pixels if channels == 3 else pixels[:, :, None]
