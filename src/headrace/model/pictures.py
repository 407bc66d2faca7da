"""Image files as a model's `preprocess` reads them: JPEG to uint8 pictures of one size."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

MAX_PIXELS = 64_000_000  # of a picture that is decoded: 192 MB


def decode_jpeg(data: bytes, size: int, *, crop: float = 0.875, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Return the middle of a JPEG as uint8 [size, size, 3], RGB, upright as its EXIF data say.

    The square in the middle has `crop` of the picture's shorter side, and is resized with antialiasing; the usual way
    of resizing to 256 and cutting 224 out is 0.875. Large pictures are decoded at a half, a quarter or an eighth, as
    far as that leaves enough pixels. Decoding does not hold the interpreter lock. Raises ValueError for what is no
    JPEG, is damaged, or has more pixels than `max_pixels`, which a small file can have.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
            width, height = picture.size
            if height * width > max_pixels:
                raise ValueError(f"the JPEG has {height} x {width} pixels, and at most {max_pixels} are decoded")
            picture.draft("RGB", (round(size / crop), round(size / crop)))
            pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError(f"{len(data)} bytes that are no JPEG file") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, of damaged files
        raise ValueError(f"the JPEG cannot be decoded: {error}") from error
    height, width, _ = pixels.shape
    side = max(1, round(min(height, width) * crop))
    top, left = (height - side) // 2, (width - side) // 2
    square = torch.from_numpy(pixels)[top : top + side, left : left + side]
    sized = functional.interpolate(square.permute(2, 0, 1)[None], (size, size), mode="bilinear", antialias=True)
    return sized[0].permute(1, 2, 0)
