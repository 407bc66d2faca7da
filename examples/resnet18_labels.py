"""Photographs in, labels out: `headrace serve examples/resnet18_labels.py:build`.

A request is uint8 [rows, 256, 256, 3], a decoded picture of that size per row; the answer is the five likeliest of
ImageNet's classes and their probabilities. Resizing, normalisation, softmax and the choice of the five run on the
device, in the same batch as the network. Trained weights are read from resnet18.pth beside this file, if it is there.
"""

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from headrace.model.steps import FromImages, TopLabels

WEIGHTS = Path(__file__).with_name("resnet18.pth")


def build() -> nn.Module:
    network = torchvision.models.resnet18()
    if WEIGHTS.exists():
        network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return nn.Sequential(FromImages(size=224), network, TopLabels(5))


def example_inputs() -> Tensor:
    return torch.randint(0, 256, (2, 256, 256, 3), dtype=torch.uint8)
