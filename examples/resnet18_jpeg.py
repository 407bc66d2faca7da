"""JPEG files in, labels out: `headrace serve examples/resnet18_jpeg.py:build`.

A row of a request is the bytes of one JPEG file; the answer is the names of the five likeliest of ImageNet's classes
and their scores. Files are decoded on the CPU, by several threads and in front of the batches; normalisation, network,
softmax and the choice of the five run on the device, in batches; names are looked up behind them. Trained weights are
read from resnet18.pth beside this file, if it is there.
"""

import io
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from headrace.model.described import Bytes, Described
from headrace.model.pictures import decode_jpeg
from headrace.model.steps import FromImages, TopLabels

WEIGHTS = Path(__file__).with_name("resnet18.pth")
NAMES = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
SIZE = 224


def preprocess(image: bytes) -> Tensor:
    return decode_jpeg(image, SIZE)  # uint8 [224, 224, 3]


def postprocess(labels: Tensor, scores: Tensor) -> dict[str, list[str] | Tensor]:
    return {"names": [NAMES[label] for label in labels.tolist()], "scores": scores}


def build() -> Described:
    network = torchvision.models.resnet18()
    if WEIGHTS.exists():
        network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    example = io.BytesIO()
    Image.effect_noise((256, 256), 64).save(example, "JPEG")
    return Described(
        nn.Sequential(FromImages(SIZE), network, TopLabels(5)),
        inputs={"image": Bytes(max_bytes=1 << 20)},
        preprocess=preprocess,
        outputs={"names": Bytes(max_bytes=64, shape=(5,))},
        postprocess=postprocess,
        example={"image": example.getvalue()},
        max_batch_size=32,
    )
