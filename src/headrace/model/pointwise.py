"""Strided convolutions of 1x1 pixel as what they are: every n-th pixel, times a matrix.

For some of them cuDNN falls back on a kernel that reads another layout. Measured on an H100 (torch 2.11, batch 256, 16
bit): ResNet-18's first shortcut, 64 to 128 channels, took 0.45 of 3.5 ms, two changes of layout included.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812  # PyTorch's own convention
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from headrace.model.fused import called, place


class StridedPointwise(nn.Module):
    """[rows, channels, height, width] to [rows, outputs, height / stride, width / stride], channels last."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.flatten(1), requires_grad=False)
        self.bias = conv.bias
        self.down, self.across = conv.stride

    def forward(self, images: Tensor) -> Tensor:
        pixels = images[:, :, :: self.down, :: self.across].permute(0, 2, 3, 1)
        return F.linear(pixels, self.weight, self.bias).permute(0, 3, 1, 2)


def rewrite_strided_pointwise(traced: GraphModule) -> int:
    """Rewrite every strided 1x1 convolution in place; return how many there were.

    Answers differ from the plain convolution's as sums in another order do.
    """
    return sum(_rewrite(traced, node) for node in list(traced.graph.nodes))


def _rewrite(traced: GraphModule, node: Node) -> bool:
    conv = called(traced, node, nn.Conv2d)
    if conv is None or not _is_strided_pointwise(conv):
        return False
    node.target = place(traced, node, StridedPointwise(conv))
    return True


def _is_strided_pointwise(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (1, 1)
        and conv.stride != (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and conv.padding in ((0, 0), "valid", "same")
    )
