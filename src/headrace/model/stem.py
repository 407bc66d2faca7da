"""The first convolution of an image model, rewritten exactly for tensor cores: padded channels, or space to depth.

A convolution over 3 channels leaves most of a tensor core idle (bf16 ResNet-18 at 250 pixels on an H100: its stem took
2.29 of 5.8 ms). A channel of zeros makes it 4, for which cuDNN has a kernel of its own in fp16; left alone, it pads by
itself, with a pass over the images. Or, with stride 2, each block of 2x2 pixels becomes the channels of one pixel of an
image of half the size; the convolution then has 4 times the channels, half the kernel and stride 1, and sums the same
products.
"""

from __future__ import annotations

import copy

import torch.nn.functional as F  # noqa: N812  # PyTorch's own convention
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from headrace.model.fused import called, place

_MOST_CHANNELS = 4  # from here on, the plain convolution does well
_LARGEST_KERNEL = 8


class SpaceToDepth(nn.Module):
    """[rows, channels, height, width] to blocks [rows, 4 * padded channels, block rows, block columns], channels last.

    Zeros stand around the image as the convolution's padding asked for, so the convolution behind needs none. Channels
    are padded to an even number: times 4, that is the multiple of 8 to which cuDNN wants 16-bit channels aligned (3
    channels become 16; on an H100 faster than 12 at large batches).
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.kernel_size = conv.kernel_size
        self.padding = conv.padding
        self.channels = _padded_channels(conv)

    def forward(self, images: Tensor) -> Tensor:
        rows, channels, height, width = images.shape
        top, left = int(self.padding[0]), int(self.padding[1])
        down = _blocks(height, self.kernel_size[0], top)
        across = _blocks(width, self.kernel_size[1], left)
        # Negative where the last row or column is one that the strides never reach.
        right, bottom = 2 * across - width - left, 2 * down - height - top
        padded = F.pad(images, (left, right, top, bottom, 0, self.channels - channels))
        blocks = padded.view(rows, self.channels, down, 2, across, 2).permute(0, 2, 4, 3, 5, 1)
        return blocks.reshape(rows, down, across, 4 * self.channels).permute(0, 3, 1, 2)


class PadChannels(nn.Module):
    """[rows, channels, height, width] to [rows, wanted, height, width], the new channels zero."""

    def __init__(self, channels: int, wanted: int) -> None:
        super().__init__()
        self.missing = wanted - channels

    def forward(self, images: Tensor) -> Tensor:
        return F.pad(images, (0, 0, 0, 0, 0, self.missing))


def space_to_depth(traced: GraphModule) -> int:
    """Rewrite every convolution of stride 2 over at most 4 channels in place; return how many there were.

    Answers differ from the plain convolution's as sums in another order do.
    """
    return sum(
        _replace(traced, node, SpaceToDepth(conv), _on_blocks(conv))
        for node in list(traced.graph.nodes)
        if (conv := called(traced, node, nn.Conv2d)) and _has_blocks(conv)
    )


def pad_channels(traced: GraphModule) -> int:
    """Pad the input of every convolution over fewer than 4 channels to 4, in place; return how many there were."""
    return sum(
        _replace(traced, node, PadChannels(conv.in_channels, _MOST_CHANNELS), _on_padded(conv))
        for node in list(traced.graph.nodes)
        if (conv := called(traced, node, nn.Conv2d)) and conv.in_channels < _MOST_CHANNELS and conv.groups == 1
    )


def _replace(traced: GraphModule, node: Node, prepare: nn.Module, conv: nn.Conv2d) -> int:
    """Call `prepare`, then `conv`: two calls, so that the convolution can still be fused with what follows it."""
    name = place(traced, node, nn.Sequential(prepare, conv))
    with traced.graph.inserting_before(node):
        prepared = traced.graph.call_module(f"{name}.0", node.args)
    node.target, node.args = f"{name}.1", (prepared,)
    return 1


def _on_padded(conv: nn.Conv2d) -> nn.Conv2d:
    padded = copy.deepcopy(conv)
    padded.in_channels = _MOST_CHANNELS
    kernel = F.pad(conv.weight, (0, 0, 0, 0, 0, _MOST_CHANNELS - conv.in_channels))
    padded.weight = nn.Parameter(kernel, requires_grad=False)
    return padded


def _has_blocks(conv: nn.Conv2d) -> bool:
    return (
        conv.in_channels <= _MOST_CHANNELS
        and conv.stride == (2, 2)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(2 <= size <= _LARGEST_KERNEL for size in conv.kernel_size)
    )


def _on_blocks(conv: nn.Conv2d) -> nn.Conv2d:
    """Return the convolution whose kernel is `conv`'s, in blocks as SpaceToDepth makes them of the image."""
    outputs, channels, height, width = conv.weight.shape
    down, across, padded_channels = (height + 1) // 2, (width + 1) // 2, _padded_channels(conv)
    padding = (0, 2 * across - width, 0, 2 * down - height, 0, padded_channels - channels)
    kernel = F.pad(conv.weight, padding).view(outputs, padded_channels, down, 2, across, 2)
    kernel = kernel.permute(0, 3, 5, 1, 2, 4).reshape(outputs, 4 * padded_channels, down, across)
    on_blocks = nn.Conv2d(4 * padded_channels, outputs, (down, across), bias=False, device="meta").train(conv.training)
    on_blocks.weight = nn.Parameter(kernel, requires_grad=False)
    on_blocks.bias = conv.bias
    return on_blocks


def _padded_channels(conv: nn.Conv2d) -> int:
    return conv.in_channels + conv.in_channels % 2


def _blocks(size: int, kernel: int, padding: int) -> int:
    """Return how many blocks of two pixels, of the padded side of an image, the convolution reads."""
    outputs = (size + 2 * padding - kernel) // 2 + 1
    return outputs + (kernel + 1) // 2 - 1
