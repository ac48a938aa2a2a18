"""Encoded bytes -> pixels, and pixels -> the size that the model wants. Everything is uint8 `[H, W, C]`.

JPEG, which is nearly all there is, takes the quick way (simplejpeg). Pillow reads the rest and whatever the quick way
refuses: other formats, CMYK, damaged and rotated files. Where both can read a file they give the same pixels.
"""

import io
import struct
import zlib

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

CHANNELS = (1, 3)  # gray and RGB: what files are decoded to
MAX_PIXELS = 178_956_970  # as Pillow: more is taken for an attack or an accident
_AREA_FROM = 1.5  # shrink by less, and a linear filter aliases no worse than it blurs
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

cv2.setNumThreads(1)  # batches are prepared side by side; threads within a resize would only get in their way


class BadImage(ValueError):
    """The bytes are no image that can be shown; the message says why, without the file's name."""


def decode(data: bytes, channels: int) -> np.ndarray:
    """The picture a person sees, `uint8 [H, W, channels]`; `channels` is 3 (RGB) or 1 (luma, ITU-R BT.601).

    Turned as EXIF says, transparent parts on white, 16 bits brought to 8, the first frame of an animation. Raises
    `BadImage` for bytes that are empty, cut short, no image, or of more than `MAX_PIXELS` pixels.
    """
    if channels not in CHANNELS:
        raise ValueError(f"images are decoded to 1 or 3 channels, not {channels}")
    if not data:
        raise BadImage("the file is empty")
    if data[:2] == b"\xff\xd8":
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            if height * width <= MAX_PIXELS and not _turned(data):
                return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
        except ValueError:
            pass  # CMYK, damage, stray bytes: Pillow reads some of these and says what is wrong with the others
    try:
        return _decode_with_pillow(data, channels)
    except _PILLOW_ERRORS as error:
        reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise BadImage(reason or type(error).__name__) from error


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`uint8 [H, W, C]` -> `uint8 [*size, C]`, antialiased.

    A side that shrinks by 1.5 or more is averaged over the area of each new pixel; else linear interpolation.
    """
    height, width = image.shape[:2]
    inner = tuple(new if old >= _AREA_FROM * new else old for old, new in zip((height, width), size, strict=True))
    for target, method in ((inner, cv2.INTER_AREA), (size, cv2.INTER_LINEAR)):
        if image.shape[:2] != target:
            image = cv2.resize(image, (target[1], target[0]), interpolation=method)
    return image if image.ndim == 3 else image[:, :, None]


def center_crop_resize(image: np.ndarray, size: tuple[int, int], ratio: float) -> np.ndarray:
    """The middle of the image at `ratio` of the largest box of `size`'s shape that fits -> `uint8 [*size, C]`.

    For a square `size` the box is `ratio` of the short side: 224/256 is the usual evaluation crop.
    """
    height, width = image.shape[:2]
    scale = ratio * min(height / size[0], width / size[1])
    box = [max(1, min(side, round(scale * new))) for side, new in zip((height, width), size, strict=True)]
    top, left = (height - box[0]) // 2, (width - box[1]) // 2
    return resize(image[top : top + box[0], left : left + box[1]], size)


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


def _turned(data: bytes) -> bool:
    """Whether EXIF asks for a turn or a mirror; only then is it worth the slower way."""
    if b"Exif\0\0" not in data:
        return False
    try:
        return Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1) != 1
    except _PILLOW_ERRORS:
        return True  # let the slower way find out


def _decode_with_pillow(data: bytes, channels: int) -> np.ndarray:
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
    image.load()
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
