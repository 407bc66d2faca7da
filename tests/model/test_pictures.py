"""JPEG files become pictures of one size, or an error that says why not; never more pixels than allowed."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from headrace.model.pictures import decode_jpeg


def jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def halves(height, width):
    """Return a picture whose left half is red and whose right half is blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 255
    return pixels


WHOLE = jpeg(halves(40, 60))


def require_halves(picture, size):
    assert (picture.dtype, tuple(picture.shape)) == (torch.uint8, (size, size, 3))
    numbers = picture.float()
    left, right = numbers[:, : size // 2 - 2].mean((0, 1)), numbers[:, size // 2 + 2 :].mean((0, 1))
    torch.testing.assert_close(left, torch.tensor([255.0, 0, 0]), atol=6, rtol=0)
    torch.testing.assert_close(right, torch.tensor([0.0, 0, 255]), atol=6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (33, 33), (700, 1100), (5, 8)])
def test_pictures_of_any_size_come_out_in_the_size_asked_for(height, width):
    picture = decode_jpeg(jpeg(halves(height, width)), 24)
    assert tuple(picture.shape) == (24, 24, 3)
    if min(height, width) > 8:
        require_halves(picture, 24)


def test_the_middle_is_what_is_left():
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 255
    assert decode_jpeg(jpeg(pixels), 16, crop=0.75).float().mean() > 250


def test_a_picture_on_its_side_is_set_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees; TIFF's tag Orientation
    require_halves(decode_jpeg(jpeg(np.rot90(halves(48, 48)).copy(), exif=exif), 24), 24)


def test_grey_and_cmyk_pictures_become_rgb():
    grey = np.full((20, 20), 99, np.uint8)
    assert decode_jpeg(jpeg(grey), 8).unique().tolist() == [99]
    file = io.BytesIO()
    Image.new("CMYK", (20, 20)).save(file, "JPEG")
    assert decode_jpeg(file.getvalue(), 8).shape == (8, 8, 3)


def test_more_pixels_than_allowed_are_not_decoded():
    with pytest.raises(ValueError, match="the JPEG has 40 x 60 pixels, and at most 2399 are decoded"):
        decode_jpeg(WHOLE, 8, max_pixels=2399)
    assert decode_jpeg(WHOLE, 8, max_pixels=2400).shape == (8, 8, 3)


def png():
    file = io.BytesIO()
    Image.fromarray(halves(8, 8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes that are no JPEG file"),
        (b"nope", "4 bytes that are no JPEG file"),
        (png(), "bytes that are no JPEG file"),
        (WHOLE[:3], "3 bytes that are no JPEG file"),
        (WHOLE[: len(WHOLE) // 2], "the JPEG cannot be decoded: "),
    ],
)
def test_what_is_no_whole_jpeg_is_refused(data, words):
    with pytest.raises(ValueError, match=words):
        decode_jpeg(data, 8)


@settings(deadline=None)
@given(at=st.integers(0, len(WHOLE) - 1), bits=st.integers(1, 255), cut=st.integers(0, len(WHOLE)))
def test_a_damaged_jpeg_is_a_picture_or_refused(at, bits, cut):
    data = bytearray(WHOLE)
    data[at] ^= bits
    for damaged in (bytes(data), WHOLE[:cut]):
        try:
            picture = decode_jpeg(damaged, 8)
        except ValueError:
            continue
        assert tuple(picture.shape) == (8, 8, 3)
