"""Decodes a JPEG quickly by simplejpeg (libjpeg-turbo): upright, and no more of it than the caller needs.

If a box will shrink by 2, 4 or 8 anyway, the inverse DCT produces the smaller image directly: in less time, and about
as near to Pillow's antialiased result as resizing the large image. (libjpeg-turbo's scales between these take longer
than full size.) With `crop_decode`, nvImageCodec's libjpeg-turbo decodes only the box's rows and columns; the pixels
are the same. Reusing a buffer for each thread was tried and gained nothing on one thread or two.
"""

import contextlib
import functools
import os
import re
import struct
import threading
from typing import Any, NamedTuple

import numpy as np

from vit_dist.data.libraries import load, nvimgcodec, simplejpeg
from vit_dist.data.pictures.resize import Box, FractionalBox

_SCALES = (8, 4, 2)
_CROP_BELOW = 0.75  # share of the image's area; above it, decoding the full image is as quick
_SEGMENT = re.compile(rb"\xff+([^\0\xff])(..)", re.DOTALL)  # fill bytes, the marker and the length
_START_OF_SCAN, _APP1 = b"\xda", b"\xe1"
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"  # how an APP1 segment with one of them begins
_ORIENTATION, _LONG = 0x0112, 4  # TIFF's tag, and TIFF's type of 32 bits
_ORIENTATION_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')

# EXIF's orientation -> how to make the stored image upright: swap rows and columns, then mirror rows, mirror columns.
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_INVERSE = {6: 8, 8: 6}  # each of the other orientations is its own inverse


class Header(NamedTuple):
    """The size of the upright image in pixels, and the EXIF orientation (1 to 8) in which it is stored."""

    height: int
    width: int
    orientation: int


def read_header(data: bytes) -> Header | None:
    """Returns the header, or None for files that Pillow must read: CMYK, rare subsampling, damaged headers."""
    read = simplejpeg.decode_jpeg_header  # before the `try`: a missing library is not the file's fault
    try:
        height, width, colours, _ = read(data)
    except (ValueError, KeyError):  # KeyError: a subsampling that simplejpeg has no name for
        return None
    if colours in ("CMYK", "YCCK"):
        return None
    orientation = _orientation(data)
    return Header(*((width, height) if _TURNS[orientation][0] else (height, width)), orientation)


def decode(data: bytes, header: Header, channels: int) -> np.ndarray | None:
    """Returns the upright image, `uint8 [H, W, channels]`; None if it is damaged or followed by stray bytes."""
    pixels = _decode(data, channels)
    return None if pixels is None else np.ascontiguousarray(_turn(pixels, header.orientation))


def decode_region(
    data: bytes, header: Header, channels: int, box: Box, size: tuple[int, int], crop_decode: bool
) -> tuple[np.ndarray, FractionalBox] | None:
    """Decodes the pixels that are needed to resize `box` to `size`.

    Args:
      data: the encoded bytes.
      header: their header.
      channels: 3 (RGB) or 1 (luma).
      box: a box of the upright image.
      size: (height, width) to which the caller will resize the box.
      crop_decode: decode a box that does not shrink by 2 or more by itself; damage outside the box is not noticed.

    Returns:
      Upright pixels `uint8 [h, w, channels]`, and the box in their coordinates. The pixels are those of the image, of
      the image at 1/2, 1/4 or 1/8 of its size if that leaves the box no smaller than `size`, or, with `crop_decode`, of
      the box. None if the image is damaged or followed by stray bytes.

    Raises:
      ConfigError: the library for `crop_decode` is not installed.
    """
    inverse = _INVERSE.get(header.orientation, header.orientation)
    stored_box = _turn_box(box, header.height, header.width, inverse)
    scale = next((scale for scale in _SCALES if box[2] >= scale * size[0] and box[3] >= scale * size[1]), 1)
    if crop_decode and scale == 1 and box[2] * box[3] < _CROP_BELOW * header.height * header.width:
        crop = _decode_crop(data, channels, stored_box)
        if crop is not None:
            return _turn(crop, header.orientation), (0, 0, *box[2:])
    rows, columns = (header.width, header.height) if _TURNS[inverse][0] else (header.height, header.width)
    pixels = _decode(data, channels, -(-rows // scale), -(-columns // scale))
    if pixels is None:
        return None
    top, left, height, width = (side / scale for side in stored_box)
    scaled_box = _turn_box((top, left, height, width), pixels.shape[0], pixels.shape[1], header.orientation)
    return _turn(pixels, header.orientation), scaled_box


def crop_codec() -> Any:
    """Returns the library that decodes only a box. Raises `ConfigError` if it is not installed."""
    # At its default verbosity it prints a warning for each file that it leaves to Pillow.
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    load(nvimgcodec)
    return nvimgcodec


class _CropDecoder(threading.local):
    """A decoder for each thread, since a decoder crashes when two threads use it at once."""

    def __init__(self) -> None:
        codec = crop_codec()
        backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
        self.decoder = codec.Decoder(codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=backends)
        options = functools.partial(codec.DecodeParams, apply_exif_orientation=False)
        gray = options(color_spec=codec.ColorSpec.GRAY, sample_format=codec.SampleFormat.I_Y)
        self.options = {1: gray, 3: options()}


_crop_decoder = functools.cache(_CropDecoder)


def _decode_crop(data: bytes, channels: int, box: tuple[Any, ...]) -> np.ndarray | None:
    """Returns the box of the stored image; None if it is damaged or the end of the file is missing."""
    crop_decoder, codec = _crop_decoder(), crop_codec()
    if not data.endswith(b"\xff\xd9"):  # the decoder does not notice an end that is missing below the box
        return None
    top, left, height, width = box
    stream = codec.CodeStream(data).get_sub_code_stream(region=codec.Region(top, left, top + height, left + width))
    image = crop_decoder.decoder.decode(stream, params=crop_decoder.options[channels])
    return None if image is None else np.asarray(image)


def _decode(data: bytes, channels: int, height: int = 0, width: int = 0) -> np.ndarray | None:
    """Returns the stored image at the smallest scale that is at least `height` x `width`; None if it is damaged."""
    read = simplejpeg.decode_jpeg  # before the `try`, as in `read_header`
    try:
        return read(data, "RGB" if channels == 3 else "GRAY", min_height=height, min_width=width)
    except ValueError:
        return None


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns a view of the stored pixels that is upright."""
    swap, mirror_rows, mirror_columns = _TURNS[orientation]
    if swap:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: -1 if mirror_rows else 1, :: -1 if mirror_columns else 1]


def _turn_box(box: FractionalBox, height: int, width: int, orientation: int) -> FractionalBox:
    """Returns where `_turn` moves a box of a stored image of this size."""
    top, left, box_height, box_width = box
    swap, mirror_rows, mirror_columns = _TURNS[orientation]
    if swap:
        height, width, top, left, box_height, box_width = width, height, left, top, box_width, box_height
    if mirror_rows:
        top = height - top - box_height
    if mirror_columns:
        left = width - left - box_width
    return top, left, box_height, box_width


def _orientation(data: bytes) -> int:
    """Returns the orientation in EXIF, or else in XMP; 1 if neither has a valid one."""
    exif, xmp = _metadata(data)
    orientation = _orientation_in_exif(exif)
    if orientation is None and (match := _ORIENTATION_IN_XMP.search(xmp)):
        orientation = int(match[1])
    return orientation if orientation in _TURNS else 1


def _orientation_in_exif(exif: bytes) -> int | None:
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    with contextlib.suppress(struct.error):  # EXIF is cut short
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for offset in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, offset)
            if tag == _ORIENTATION:
                # The standard has 16 bits; some programs write 32.
                (value,) = struct.unpack_from(order + ("I" if kind == _LONG else "H"), exif, offset + 8)
                return int(value)
    return None


def _metadata(data: bytes) -> tuple[bytes, bytes]:
    """Returns EXIF and XMP, empty if absent, from the segments; to search the file takes 20 times as long."""
    exif = xmp = b""
    end = 2
    while (segment := _SEGMENT.match(data, end)) and segment[1] != _START_OF_SCAN:
        start, end = segment.end(), segment.end() - 2 + int.from_bytes(segment[2])
        if segment[1] == _APP1 and data.startswith(_EXIF, start):
            exif += data[start + len(_EXIF) : end]  # EXIF that is too long for a segment continues in the next
        elif segment[1] == _APP1 and data.startswith(_XMP, start):
            xmp = data[start + len(_XMP) : end]
    return exif, xmp
