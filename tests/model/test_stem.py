import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headrace.model.fused import trace
from headrace.model.stem import pad_channels, space_to_depth


class Calls(nn.Module):
    """Calls its convolution `times` times, and reads its weight if asked to."""

    def __init__(self, conv: nn.Conv2d, *, times: int = 1, reads_weight: bool = False):
        super().__init__()
        self.conv = conv
        self.times = times
        self.reads_weight = reads_weight

    def forward(self, x):
        results = [self.conv(x + i) for i in range(self.times)]
        return [*results, self.conv.weight.sum()] if self.reads_weight else results


def rewritten(model: nn.Module, rewrite=space_to_depth) -> tuple[nn.Module, int]:
    traced = trace(model.double().eval())
    count = rewrite(traced)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced, count


def images(conv: nn.Conv2d, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randn(2, conv.in_channels, height, width, dtype=torch.float64, generator=generator)


def assert_exact(conv: nn.Conv2d, height: int, width: int, rewrite=space_to_depth):
    x = images(conv, height, width)
    model, count = rewritten(nn.Sequential(conv), rewrite)
    assert count == 1
    torch.testing.assert_close(model(x), conv(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), conv(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (250, 250), (225, 231)])
@pytest.mark.parametrize(("kernel", "padding"), [(7, 3), (3, 1), (6, 0), (7, 0), (3, 0), (6, 3), (2, 1)])
def test_the_rewritten_stem_sums_the_same_products(kernel, padding, height, width):
    assert_exact(nn.Conv2d(3, 4, kernel, 2, padding), height, width)


sides = st.tuples(st.integers(2, 8), st.integers(0, 5), st.integers(8, 40))  # kernel, padding, size


@settings(max_examples=60, deadline=None)
@given(down=sides, across=sides, channels=st.integers(1, 4), bias=st.booleans())
def test_any_kernel_padding_size_and_channels(down, across, channels, bias):
    (kernel_height, top, height), (kernel_width, left, width) = down, across
    conv = nn.Conv2d(channels, 3, (kernel_height, kernel_width), 2, (top, left), bias=bias)
    assert_exact(conv, height, width)


@pytest.mark.parametrize(("channels", "blocks"), [(1, 8), (2, 8), (3, 16), (4, 16)])
def test_channels_become_a_multiple_of_eight_and_come_last_in_memory(channels, blocks):
    model, _ = rewritten(nn.Sequential(nn.Conv2d(channels, 4, 7, 2, 3)))
    seen = []
    model.get_submodule("0.1").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.zeros(2, channels, 20, 20, dtype=torch.float64))
    assert seen[0].shape == (2, blocks, 13, 13)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(5, 4, 3, 2),
        nn.Conv2d(3, 4, 3, 1),
        nn.Conv2d(3, 4, 3, (2, 1)),
        nn.Conv2d(3, 4, 9, 2),
        nn.Conv2d(3, 4, 1, 2),
        nn.Conv2d(3, 4, 3, 2, dilation=2),
        nn.Conv2d(3, 3, 3, 2, groups=3),
        nn.Conv2d(3, 4, 3, 2, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, 2, padding="valid"),
    ],
    ids=["channels", "stride", "one stride", "kernel 9", "kernel 1", "dilation", "groups", "reflect", "word"],
)
def test_other_convolutions_stay(conv):
    x = images(conv, 20, 20)
    model, count = rewritten(nn.Sequential(conv))
    assert count == 0
    assert torch.equal(model(x), conv(x))


@pytest.mark.parametrize(("times", "reads_weight"), [(2, False), (1, True)], ids=["called twice", "weight read"])
def test_a_convolution_used_elsewhere_keeps_its_weight_there(times, reads_weight):
    model = Calls(nn.Conv2d(3, 4, 7, 2, 3), times=times, reads_weight=reads_weight)
    x = images(model.conv, 20, 20)
    changed, count = rewritten(model)
    assert count == times
    torch.testing.assert_close(changed(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 7, 2, 3),
        nn.Conv2d(1, 4, 3, 1, bias=False),
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, (5, 1), dilation=(2, 1), padding="same"),
    ],
    ids=["stem", "one channel", "reflect", "dilated"],
)
def test_padded_channels_sum_the_same_products(conv):
    assert_exact(conv, 23, 30, pad_channels)


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 4, 3), nn.Conv2d(3, 3, 3, groups=3)], ids=["4 channels", "groups"])
def test_convolutions_that_need_no_padded_channels_stay(conv):
    _, count = rewritten(nn.Sequential(conv), pad_channels)
    assert count == 0


def test_padded_channels_keep_the_layout_that_the_images_have():
    model, _ = rewritten(nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3)), pad_channels)
    seen = []
    model.get_submodule("0.1").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.zeros(2, 3, 20, 20, dtype=torch.float64).contiguous(memory_format=torch.channels_last))
    assert seen[0].shape == (2, 4, 20, 20)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
