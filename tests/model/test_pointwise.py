import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headrace.model.fused import trace
from headrace.model.pointwise import rewrite_strided_pointwise


def rewritten(conv):
    traced = trace(nn.Sequential(conv).double().eval())
    count = rewrite_strided_pointwise(traced)
    traced.recompile()
    return traced, count


@settings(max_examples=40, deadline=None)
@given(
    stride=st.tuples(st.integers(1, 3), st.integers(2, 3)),
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.integers(1, 5),
    bias=st.booleans(),
)
def test_every_nth_pixel_times_a_matrix_is_the_convolution(stride, sides, channels, bias):
    conv = nn.Conv2d(channels, 3, 1, stride, bias=bias)
    x = torch.randn(2, channels, *sides, dtype=torch.float64)
    model, count = rewritten(conv)
    assert count == 1
    answers = model(x)
    torch.testing.assert_close(answers, conv(x), rtol=1e-12, atol=1e-12)
    assert answers.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, 2),
        nn.Conv2d(4, 4, 1, 2, padding=1),
        nn.Conv2d(4, 4, 1, 2, groups=2),
    ],
    ids=["stride 1", "kernel 3", "padding", "groups"],
)
def test_other_convolutions_stay(conv):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model, count = rewritten(conv)
    assert count == 0
    assert torch.equal(model(x), conv(x))
