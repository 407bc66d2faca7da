"""A model that costs next to nothing, so that the way to it is measured: `--model benchmarks/tiny_model.py:build`."""

import torch


def build() -> torch.nn.Module:
    """Return 10 numbers for each image, from a strided convolution."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 10),
    )
