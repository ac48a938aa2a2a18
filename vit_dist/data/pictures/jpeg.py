"""The quick way to read a JPEG: upright, and no more of it than is wanted, by simplejpeg (libjpeg-turbo).

Where a box is to shrink by 2, 4 or 8 anyway, the inverse DCT makes the smaller image at once: in less time, and about
as near to Pillow's antialiased result as resizing the large image is. (Its scales between these take longer than the
whole image.) With `crop_decode`, nvImageCodec's libjpeg-turbo decodes the rows and columns of the box alone; the pixels
are the same. Memory kept for each thread to decode into was tried, and gained nothing on one thread or two.
"""

import functools
import os
import re
import struct
import threading
from typing import Any, NamedTuple

import numpy as np

from vit_dist.data.libraries import load, nvimgcodec, simplejpeg
from vit_dist.data.pictures.resize import Box, PartBox

_SCALES = (8, 4, 2)
_CROP_BELOW = 0.75  # of the image's area; for a larger box, all of the image is decoded as quickly
_SEGMENT = re.compile(rb"\xff+([^\0\xff])(..)", re.DOTALL)  # fill bytes, the marker and the length
_START_OF_SCAN, _APP1 = b"\xda", b"\xe1"
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"  # how an APP1 segment with one of them begins
_ORIENTATION, _LONG = 0x0112, 4  # TIFF's tag, and its type of 32 bits
_ORIENTATION_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')

# The orientation -> what makes the stored image upright: swap rows and columns, then mirror the rows, the columns.
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
_WAY_BACK = {6: 8, 8: 6}  # each of the others is its own


class Header(NamedTuple):
    """The size of the upright image in pixels, and how it is stored: the orientation as EXIF numbers it, 1 to 8."""

    height: int
    width: int
    orientation: int


def read_header(data: bytes) -> Header | None:
    """None for what is left to Pillow: CMYK, odd subsampling, and headers that are damaged."""
    read = simplejpeg.decode_jpeg_header  # before the `try`: a library that is missing is no fault of the file
    try:
        height, width, colours, _ = read(data)
    except (ValueError, KeyError):  # KeyError: a subsampling that simplejpeg has no name for
        return None
    if colours in ("CMYK", "YCCK"):
        return None
    orientation = _orientation(data)
    return Header(*((width, height) if _TURNS[orientation][0] else (height, width)), orientation)


def decode(data: bytes, header: Header, channels: int) -> np.ndarray | None:
    """The image, `uint8 [H, W, channels]`; None where it is damaged or followed by stray bytes."""
    pixels = _decode(data, channels)
    return None if pixels is None else np.ascontiguousarray(_turn(pixels, header.orientation))


def decode_part(
    data: bytes, header: Header, channels: int, box: Box, size: tuple[int, int], crop_decode: bool
) -> tuple[np.ndarray, PartBox] | None:
    """What it takes to bring `box` to `size`: `uint8 [h, w, channels]`, and where in these pixels the box is.

    They are the whole image; or that made smaller by a power of two, which leaves the box no smaller than `size`; or,
    with `crop_decode`, the box alone, and then damage elsewhere is not seen. None as `decode`. Raises `ConfigError`
    where `crop_decode` is asked for and its library is not installed.
    """
    back = _WAY_BACK.get(header.orientation, header.orientation)
    stored = _turn_box(box, header.height, header.width, back)
    scale = next((scale for scale in _SCALES if box[2] >= scale * size[0] and box[3] >= scale * size[1]), 1)
    if crop_decode and scale == 1 and box[2] * box[3] < _CROP_BELOW * header.height * header.width:
        crop = _decode_crop(data, channels, stored)
        if crop is not None:
            return _turn(crop, header.orientation), (0, 0, *box[2:])
    rows, columns = (header.width, header.height) if _TURNS[back][0] else (header.height, header.width)
    pixels = _decode(data, channels, -(-rows // scale), -(-columns // scale))
    if pixels is None:
        return None
    top, left, height, width = (side / scale for side in stored)
    place = _turn_box((top, left, height, width), pixels.shape[0], pixels.shape[1], header.orientation)
    return _turn(pixels, header.orientation), place


def crop_codec() -> Any:
    """The library that decodes a box alone. Raises `ConfigError` where it is not installed."""
    # unless told otherwise, it speaks up for each file that Pillow then reads or refuses
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    load(nvimgcodec)
    return nvimgcodec


class _CropDecoder(threading.local):
    """One for each thread, for two threads in one decoder crash."""

    def __init__(self) -> None:
        codec = crop_codec()
        backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
        self.decoder = codec.Decoder(codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=backends)
        gray = {"color_spec": codec.ColorSpec.GRAY, "sample_format": codec.SampleFormat.I_Y}
        self.options = {
            channels: codec.DecodeParams(apply_exif_orientation=False, **colours)
            for channels, colours in ((1, gray), (3, {}))
        }


_crop_decoder = functools.cache(_CropDecoder)


def _decode_crop(data: bytes, channels: int, box: tuple[Any, ...]) -> np.ndarray | None:
    """The box of the stored image; None where it is damaged, or the file is not whole."""
    mine, codec = _crop_decoder(), crop_codec()
    if not data.endswith(b"\xff\xd9"):  # an end that is missing would not be missed below the box
        return None
    top, left, height, width = box
    stream = codec.CodeStream(data).get_sub_code_stream(region=codec.Region(top, left, top + height, left + width))
    image = mine.decoder.decode(stream, params=mine.options[channels])
    return None if image is None else np.asarray(image)


def _decode(data: bytes, channels: int, height: int = 0, width: int = 0) -> np.ndarray | None:
    """The stored image, at the smallest scale that is no smaller than this."""
    read = simplejpeg.decode_jpeg  # before the `try`, as above
    try:
        return read(data, "RGB" if channels == 3 else "GRAY", min_height=height, min_width=width)
    except ValueError:
        return None


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The stored image, made upright; a view of it."""
    swap, mirror_rows, mirror_columns = _TURNS[orientation]
    if swap:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: -1 if mirror_rows else 1, :: -1 if mirror_columns else 1]


def _turn_box(box: PartBox, height: int, width: int, orientation: int) -> PartBox:
    """Where a box of an image of this size is after `_turn`."""
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
    """What EXIF says of it, or else XMP; 1 where neither says anything that can be understood."""
    exif, xmp = _metadata(data)
    orientation = _orientation_in_exif(exif)
    if orientation is None:
        found = _ORIENTATION_IN_XMP.search(xmp)
        orientation = 1 if found is None else int(found[1])
    return orientation if orientation in _TURNS else 1


def _orientation_in_exif(exif: bytes) -> int | None:
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, place)
            if tag == _ORIENTATION:
                # written with 16 bits, and by some with 32
                (value,) = struct.unpack_from(order + ("I" if kind == _LONG else "H"), exif, place + 8)
                return int(value)
    except struct.error:  # cut short
        pass
    return None


def _metadata(data: bytes) -> tuple[bytes, bytes]:
    """EXIF and XMP; empty where there is none. (To search the whole file takes 20 times as long.)"""
    exif = xmp = b""
    place = 2
    while (segment := _SEGMENT.match(data, place)) and segment[1] != _START_OF_SCAN:
        start, place = segment.end(), segment.end() - 2 + int.from_bytes(segment[2])
        if segment[1] == _APP1 and data.startswith(_EXIF, start):
            exif += data[start + len(_EXIF) : place]  # what is too long for one segment goes on in the next
        elif segment[1] == _APP1 and data.startswith(_XMP, start):
            xmp = data[start + len(_XMP) : place]
    return exif, xmp
