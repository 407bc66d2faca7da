import copy
import operator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from headrace.model.fused import ConvAddRelu, ConvRelu, Untraceable, fold_batch_norms, fuse_epilogues, trace

ROWS = torch.randn(2, 4, 9, 11, generator=torch.Generator().manual_seed(0))


def lively(model: nn.Module) -> nn.Module:
    """Batch norms with statistics of their own, in place of mean 0 and variance 1."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias, module.weight):
                if values is not None:
                    nn.init.normal_(values)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval().requires_grad_(requires_grad=False)


class Net(nn.Module):
    """`forward` is a function of the module and its input."""

    def __init__(self, forward, conv=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.scale = nn.Conv2d(4, 4, (9, 11))
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.relu_in_place = nn.ReLU(inplace=True)
        self.call = forward

    def forward(self, x):
        return self.call(self, x)


def assert_same_answers(model: nn.Module, rewrite, expected: int):
    model = lively(model)
    traced = trace(copy.deepcopy(model))
    assert rewrite(traced) == expected
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    torch.testing.assert_close(traced(ROWS.clone()), model(ROWS.clone()), rtol=1e-4, atol=1e-5)
    return traced


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_becomes_part_of_its_convolution(bias, groups, affine):
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups, bias=bias), nn.BatchNorm2d(8, affine=affine))
    assert norms(assert_same_answers(model, fold_batch_norms, 1)) == 0


def called_twice_with_one_norm(net, x):
    return net.norm(net.conv(x)) + net.norm(net.conv(2 * x))


def called_again_without_the_norm(net, x):
    return net.norm(net.conv(x)) + net.conv(x + 1)


def weight_read_elsewhere(net, x):
    return net.norm(net.conv(x)) * net.conv.weight.sum()


@pytest.mark.parametrize(
    ("forward", "expected"),
    [(called_twice_with_one_norm, 2), (called_again_without_the_norm, 1), (weight_read_elsewhere, 1)],
)
def test_shared_modules_are_folded_at_each_call_for_itself(forward, expected):
    assert_same_answers(Net(forward), fold_batch_norms, expected)


def read_before_the_norm(net, x):
    y = net.conv(x)
    return net.norm(y) + y


def test_a_result_that_others_read_is_not_folded():
    assert_same_answers(Net(read_before_the_norm), fold_batch_norms, 0)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda _module, _args, output: output + 1)
    return module


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(hooked(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
    ],
    ids=["hooks", "parametrised", "statistics of the batch"],
)
def test_what_computes_more_than_its_weights_say_is_not_folded(model):
    assert_same_answers(model, fold_batch_norms, 0)


@pytest.mark.parametrize(
    "relu",
    [
        lambda net, x: net.relu(net.conv(x)),
        lambda net, x: net.relu_in_place(net.conv(x)),
        lambda net, x: F.relu(net.conv(x)),
        lambda net, x: F.relu(net.conv(x), inplace=True),
        lambda net, x: torch.relu(net.conv(x)),
        lambda net, x: net.conv(x).relu(),
        lambda net, x: net.conv(x).relu_(),
    ],
)
def test_every_way_to_write_relu_after_a_convolution_is_fused(relu):
    traced = assert_same_answers(Net(relu), fuse_epilogues, 1)
    assert [type(module) for module in traced.modules()].count(ConvRelu) == 1


@pytest.mark.parametrize(
    "add",
    [
        lambda conv, other: conv + other,
        lambda conv, other: other + conv,
        operator.iadd,
        torch.add,
        lambda conv, other: other.add(conv),
        lambda conv, other: conv.add_(other),
    ],
)
def test_every_way_to_add_a_residual_is_fused(add):
    traced = assert_same_answers(Net(lambda net, x: net.relu(add(net.conv(x), x))), fuse_epilogues, 1)
    assert [type(module) for module in traced.modules()].count(ConvAddRelu) == 1


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
    ],
    ids=["no bias", "dilation", "groups"],
)
def test_the_convolutions_settings_are_kept(conv):
    assert_same_answers(Net(lambda net, x: net.relu(net.conv(x) + x), conv), fuse_epilogues, 1)


def summand_with_one_pixel(net, x):
    return net.relu(net.conv(x) + x.mean((2, 3), keepdim=True))


def summand_larger_than_the_convolution(net, x):
    return net.relu(net.scale(x) + x)


def summand_of_another_dtype(net, x):
    return net.relu(net.conv(x) + x.double()).float()


def summand_that_is_a_number(net, x):
    return net.relu(net.conv(x) + x.size(2))


def two_convolutions(net, x):
    return net.relu(net.conv(x) + net.second(x))


def second_branch_written_in_place(net, x):  # RegNet's order: only the later convolution may move
    return net.relu(net.conv(x) + net.second(net.relu_in_place(x + 1)))


@pytest.mark.parametrize(
    "forward",
    [
        summand_with_one_pixel,
        summand_larger_than_the_convolution,
        summand_of_another_dtype,
        summand_that_is_a_number,
        two_convolutions,
        second_branch_written_in_place,
    ],
)
def test_what_is_added_may_be_anything_that_plain_code_adds(forward):
    assert_same_answers(Net(forward), fuse_epilogues, 1)


def convolution_read_twice(net, x):
    y = net.conv(x)
    return net.relu(y) + y


def sum_read_twice(net, x):
    y = net.conv(x) + x
    return net.relu(y) + y


def summand_read_twice(net, x):
    y = net.conv(x)
    return net.relu(y + x) + y


def doubled(net, x):
    y = net.conv(x)
    return net.relu(y + y)


def scaled_sum(net, x):
    return net.relu(torch.add(net.conv(x), x, alpha=2))


def residual_written_in_place(net, x):
    other = x + 1
    return net.relu(other.add_(net.conv(x))) + other


def input_overwritten_before_the_sum(net, x):
    x = x + 1
    y = net.conv(x)
    return net.relu(y + net.relu_in_place(x))


def input_overwritten_before_the_relu(net, x):
    x = x + 1
    y = net.conv(x)
    x.mul_(2)
    return net.relu(y) + x


@pytest.mark.parametrize(
    "forward",
    [
        convolution_read_twice,
        sum_read_twice,
        summand_read_twice,
        doubled,
        scaled_sum,
        residual_written_in_place,
        input_overwritten_before_the_sum,
        input_overwritten_before_the_relu,
    ],
)
def test_what_cannot_be_fused_safely_stays(forward):
    assert_same_answers(Net(forward), fuse_epilogues, 0)


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")],
    ids=["padding in words", "circular"],
)
def test_convolutions_that_cudnn_does_otherwise_stay(conv):
    assert_same_answers(Net(lambda net, x: net.relu(net.conv(x)), conv), fuse_epilogues, 0)


def test_a_relu_with_hooks_stays():
    net = Net(lambda net, x: net.relu(net.conv(x)))
    hooked(net.relu)
    assert_same_answers(net, fuse_epilogues, 0)


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (3, 2, 0, 2), (2, 3, 1, 1)])
def test_the_output_shape_is_known_before_it_is_computed(kernel, stride, padding, dilation):
    conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation)
    assert ConvAddRelu(conv).output_shape(ROWS) == tuple(conv(ROWS).shape)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x, mask=None):
        return self.conv(x) if mask is None else self.conv(x * mask)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Linear(4, 4), "no convolution"),
        (Net(lambda net, x: net.conv(x) if x.sum() > 0 else x), "control flow"),
        (hooked(Net(lambda net, x: net.conv(x))), "hooks"),
        (Optional(), r"may be left out \(mask\)"),
    ],
    ids=["no convolution", "branches on values", "hooks", "optional input"],
)
def test_a_graph_that_would_not_stand_for_the_model_is_refused(model, reason):
    with pytest.raises(Untraceable, match=reason):
        trace(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("groups", [1, 4, 32])
def test_cudnn_computes_what_the_plain_operations_do(dtype, memory_format, groups):
    conv = nn.Conv2d(32, 32, 3, padding=1, groups=groups, bias=groups == 1).cuda().requires_grad_(requires_grad=False)
    x, other = (torch.randn(3, 32, 15, 17, device="cuda") for _ in range(2))
    plain = copy.deepcopy(conv).double()(x.double())
    conv = conv.to(dtype).to(memory_format=memory_format)
    rows = x.to(dtype, memory_format=memory_format)
    tolerance = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(ConvRelu(conv)(rows).double(), F.relu(plain), **tolerance)
    torch.testing.assert_close(
        ConvAddRelu(conv)(rows, other.to(dtype)).double(), F.relu(plain + other.double()), **tolerance
    )
