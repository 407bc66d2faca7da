"""What all servers serve: ResNet-18, and a model that costs next to nothing, so that the way to it is measured."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import nn

SEED = 0


def build(name: str, folder: Path) -> nn.Module:
    """Return `resnet18`, with the weights of the checkpoint in `folder`, or `tiny`; in evaluation mode, on the CPU."""
    if name == "tiny":
        return tiny().eval()
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    model.load_state_dict(torch.load(checkpoint_path(name, folder), weights_only=True))
    return model.eval()


def checkpoint_path(name: str, folder: Path) -> Path:
    """Return where `headrace serve --model-dir FOLDER --no-download` looks for seeded random weights."""
    return folder / f"{name}-random-seed{SEED}.pth"


def tiny() -> nn.Module:
    """Return 1000 numbers for each row [3, 250, 250], all of which it reads once."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(75, 1000))


def example_inputs() -> tuple[torch.Tensor]:
    """Tell `headrace serve benchmarks/servers/models.py:tiny` what a batch looks like."""
    return (torch.zeros(2, 3, 250, 250),)
