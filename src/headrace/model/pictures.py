"""Image files as a model's `preprocess` reads them: JPEG to uint8 pictures of one size."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode
from torchvision.io import decode_jpeg as decode

MAX_PIXELS = 64_000_000  # of a picture that is decoded: 192 MB
_START = b"\xff\xd8"
_SIZES = struct.Struct(">HH")
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that begin a frame
_ALONE = frozenset((0x01, *range(0xD0, 0xD8)))  # markers without a segment


class Size(NamedTuple):
    height: int
    width: int


def decode_jpeg(data: bytes, size: int, *, crop: float = 0.875, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Return the middle of a JPEG as uint8 [size, size, 3], RGB, upright as its EXIF data say.

    The square in the middle has `crop` of the picture's shorter side, and is resized with antialiasing; the usual way
    of resizing to 256 and cutting 224 out is 0.875. Decoding does not hold the interpreter lock. Raises ValueError for
    what is no JPEG, is damaged, or has more pixels than `max_pixels`, which a small file can have.
    """
    found = jpeg_size(data)
    if found.height * found.width > max_pixels:
        raise ValueError(f"the JPEG has {found.height} x {found.width} pixels, and at most {max_pixels} are decoded")
    try:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        picture = decode(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError as error:
        raise ValueError(f"the JPEG cannot be decoded: {str(error).splitlines()[0].rpartition(', ')[2]}") from error
    _, height, width = picture.shape
    side = max(1, round(min(height, width) * crop))
    top, left = (height - side) // 2, (width - side) // 2
    square = picture[None, :, top : top + side, left : left + side]
    sized = functional.interpolate(square, (size, size), mode="bilinear", antialias=True)
    return sized[0].permute(1, 2, 0)


def jpeg_size(data: bytes) -> Size:
    """Return a JPEG's size in pixels, from its header alone. Raises ValueError if there is none.

    Source: ITU-T T.81, annex B.
    """
    at = len(_START)
    if not data.startswith(_START):
        raise ValueError(f"{len(data)} bytes that are no JPEG: one begins with ff d8")
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            return Size(*_SIZES.unpack_from(data, at + 5))
        if marker == 0xFF:  # fill
            at += 1
        else:
            at += 2 if marker in _ALONE else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise ValueError(f"{len(data)} bytes that are no JPEG: its header ends before it says how large the picture is")
