"""What comes before and after a model, as modules: compose them with it, and they run on the device in its batches.

build = lambda: torch.nn.Sequential(FromImages(224), torchvision.models.resnet18(), TopLabels(5))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's docs, of values 0 to 1


class FromImages(nn.Module):
    """Make uint8 images what a network takes: resized, scaled, normalised.

    From uint8 [rows, height, width, 3], as image files decode, to [rows, 3, size, size] of the module's float dtype.
    Resizing stretches, with antialiasing; what is to be cut away, the sender cuts.
    """

    def __init__(self, size: int, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.size = size
        scale = torch.tensor([1 / (255 * deviation) for deviation in std]).reshape(3, 1, 1)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).reshape(3, 1, 1)
        # As bits, since a module that is moved to 16 bits takes its float buffers along, and these are to stay exact.
        self.register_buffer("scale_bits", scale.view(torch.int32))
        self.register_buffer("shift_bits", shift.view(torch.int32))
        self.register_buffer("like", torch.zeros(1))  # knows the module's float dtype
        self.scale_bits: Tensor
        self.shift_bits: Tensor
        self.like: Tensor

    def forward(self, images: Tensor) -> Tensor:
        sized = _sized(images.permute(0, 3, 1, 2).float(), self.size)
        return _normalised(sized, self.scale_bits, self.shift_bits, self.like)


@torch.fx.wrap  # one step to whoever traces the module, who has no shapes to decide by
def _sized(planes: Tensor, size: int) -> Tensor:
    if planes.shape[2:] == (size, size):  # resizing would cost as much, and change nothing
        return planes
    return functional.interpolate(planes, (size, size), mode="bilinear", antialias=True)


@torch.fx.wrap  # one step to whoever traces the module; else today's dtype and values would be traced as constants
def _normalised(images: Tensor, scale_bits: Tensor, shift_bits: Tensor, like: Tensor) -> Tensor:
    return (images * scale_bits.view(torch.float32) + shift_bits.view(torch.float32)).to(like.dtype)


class TopLabels(nn.Module):
    """Make logits [rows, classes] the likeliest classes: labels, int64 [rows, k], and scores, float32 [rows, k].

    Scores are softmax's, the largest first.
    """

    def __init__(self, k: int = 5) -> None:
        super().__init__()
        self.k = k

    def forward(self, logits: Tensor) -> dict[str, Tensor]:
        scores, labels = logits.float().softmax(1).topk(self.k, 1)
        return {"labels": labels, "scores": scores}
