"""`tiny_model.py` with JPEG files in place of tensors: `--model benchmarks/tiny_jpeg.py:build`."""

import io

from PIL import Image
from tiny_model import build as build_tiny
from torch import nn

from headrace.model.described import Bytes, Described
from headrace.model.pictures import decode_jpeg
from headrace.model.steps import FromImages

SIZE = 224


def build() -> Described:
    example = io.BytesIO()
    Image.effect_noise((SIZE, SIZE), 64).save(example, "JPEG")
    return Described(
        nn.Sequential(FromImages(SIZE), build_tiny()),
        inputs={"image": Bytes(max_bytes=1 << 18)},
        preprocess=lambda image: decode_jpeg(image, SIZE),
        example={"image": example.getvalue()},
    )
