"""A model as a graph: batch norms folded into convolutions, and convolutions with cuDNN's fused epilogues.

A rewrite changes a torch.fx graph in place and returns how often it applied. Where it is not certain that the answers
stay the same, it leaves the graph as it is: a result that someone else reads, a module with hooks or of a derived
class, a tensor that may be overwritten in between.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Iterator
from typing import TypeVar, cast

import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own convention
from torch import Tensor, nn
from torch.fx import GraphModule, Node, symbolic_trace
from torch.nn.utils.fusion import fuse_conv_bn_eval

from headrace.processes import describe

M = TypeVar("M", bound=nn.Module)

_FOLDED_INTO: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.BatchNorm1d, nn.Conv1d),
    (nn.BatchNorm2d, nn.Conv2d),
    (nn.BatchNorm3d, nn.Conv3d),
)
_RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_ADDS = {operator.add, torch.add, "add"}
_ADDS_IN_PLACE = {operator.iadd, "add_"}
_WRITING_OPERATORS = {
    *(operator.iadd, operator.isub, operator.imul, operator.imatmul, operator.itruediv, operator.ifloordiv),
    *(operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
    operator.setitem,
}
_CUDNN_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Untraceable(Exception):
    """The model has no torch.fx graph that is sure to stand for all of it; the message says why."""


class FusedConv(nn.Module):
    """What the fused convolutions share: the tensors and settings of the convolution that they stand for."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = conv.weight
        # Left out, PyTorch would fill a bias with zeros at every call: one kernel more.
        zeros = conv.weight.new_zeros(conv.out_channels)
        self.bias = nn.Parameter(zeros, requires_grad=False) if conv.bias is None else conv.bias
        self.stride = conv.stride
        self.padding = cast("tuple[int, int]", conv.padding)  # a word has been refused by _fusable
        self.dilation = conv.dilation
        self.groups = conv.groups

    def convolve(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def runs_on_cudnn(self, x: Tensor) -> bool:
        return x.is_cuda and x.ndim == 4 and x.dtype == self.weight.dtype and x.dtype in _CUDNN_DTYPES

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        kernel = self.weight.shape[2:]
        sides = zip(x.shape[2:], kernel, self.stride, self.padding, self.dilation, strict=True)
        spatial = ((size + 2 * pad - gap * (k - 1) - 1) // step + 1 for size, k, step, pad, gap in sides)
        return (x.shape[0], self.weight.shape[0], *spatial)


class ConvRelu(FusedConv):
    """relu(conv(x)): one kernel of cuDNN on an NVIDIA GPU, plain operations elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        if self.runs_on_cudnn(x):
            return torch.cudnn_convolution_relu(
                x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
            )
        return F.relu(self.convolve(x))


class ConvAddRelu(FusedConv):
    """relu(conv(x) + other): one kernel of cuDNN on an NVIDIA GPU, plain operations elsewhere.

    cuDNN does not broadcast or promote, so an `other` of another shape or dtype is added plainly, also on the GPU.
    One of another memory format is copied by PyTorch first (ConvShared.cpp, cudnn_convolution_add_relu).
    """

    def forward(self, x: Tensor, other: Tensor | float) -> Tensor:
        if self.runs_on_cudnn(x) and isinstance(other, Tensor) and self.is_alike(x, other):
            return torch.cudnn_convolution_add_relu(
                x, self.weight, other, 1.0, self.bias, self.stride, self.padding, self.dilation, self.groups
            )
        return F.relu(self.convolve(x) + other)

    def is_alike(self, x: Tensor, other: Tensor) -> bool:
        return other.dtype == x.dtype and tuple(other.shape) == self.output_shape(x)


def trace(model: nn.Module) -> GraphModule:
    """Return the model as a graph that shares its parameters. Raises Untraceable."""
    if not any(isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for module in model.modules()):
        raise Untraceable("the model has no convolution")
    if has_hooks(model):
        raise Untraceable("the model has hooks, which a torch.fx trace would lose")
    try:
        parameters = inspect.signature(model.forward).parameters.values()
        traced = symbolic_trace(model)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise Untraceable(f"torch.fx cannot trace the model ({describe(error)})") from error
    if optional := [p.name for p in parameters if p.default is not p.empty or p.kind is p.VAR_KEYWORD]:
        # `if mask is None` has been decided by now, and not by what a request brings.
        raise Untraceable(f"inputs may be left out ({', '.join(optional)}), and a torch.fx trace knows one case only")
    return traced


def fold_batch_norms(traced: GraphModule) -> int:
    """Fold every batch norm that alone reads a convolution's result into that convolution's weights and bias."""
    return sum(_fold(traced, node) for node in list(traced.graph.nodes))


def fuse_epilogues(traced: GraphModule) -> int:
    """Turn conv -> relu and conv -> add(other) -> relu into one call each."""
    return sum(_fuse(traced, node) for node in list(traced.graph.nodes))


def called(traced: GraphModule, node: object, kind: type[M]) -> M | None:
    """Return the module that `node` calls with one argument if it is of that very class and has no hooks."""
    if not isinstance(node, Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    module = traced.get_submodule(str(node.target))
    # Derived and parametrised classes compute something else.
    if isinstance(module, kind) and type(module) is kind and not has_hooks(module):
        return module
    return None


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001  # there is no public way to ask


def place(traced: GraphModule, node: Node, module: nn.Module) -> str:
    """Put `module` where the one that `node` calls is, and return its name: another one if that is used elsewhere."""
    name = str(node.target)
    if any(other is not node and _refers_to(other, name) for other in traced.graph.nodes):
        taken = {taken for taken, _ in traced.named_modules(remove_duplicate=False)}
        name = next(free for i in itertools.count(2) if (free := f"{name}_{i}") not in taken)
    traced.add_submodule(name, module)
    return name


def _refers_to(node: Node, name: str) -> bool:
    return node.op in ("call_module", "get_attr") and f"{node.target}.".startswith(f"{name}.")


def _fold(traced: GraphModule, node: Node) -> bool:
    for norm_class, conv_class in _FOLDED_INTO:
        norm = called(traced, node, norm_class)
        source = node.args[0] if norm else None
        conv = called(traced, source, conv_class)
        if norm and conv and isinstance(source, Node) and len(source.users) == 1 and _is_fixed(norm, conv):
            # The cast says what the pairs above say: fuse_conv_bn_eval's type variable is private.
            folded = fuse_conv_bn_eval(cast("nn.Conv2d", conv), cast("nn.BatchNorm2d", norm))
            source.target = place(traced, source, folded)
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
            return True
    return False


def _is_fixed(norm: nn.Module, conv: nn.Module) -> bool:
    """Tell whether the norm's statistics are stored ones, and not each batch's own."""
    return getattr(norm, "running_var", None) is not None and not (norm.training or conv.training)


def _fuse(traced: GraphModule, relu: Node) -> bool:
    source = relu.args[0] if _is_relu(traced, relu) else None
    if not isinstance(source, Node) or len(source.users) != 1:
        return False
    if conv := _fusable(traced, source, relu):
        _replace(traced, relu, [source], ConvRelu(conv), ())
        return True
    for node, other in _addends(source):
        conv = _fusable(traced, node, relu, addition=source)
        if conv and len(node.users) == 1:
            _replace(traced, relu, [source, node], ConvAddRelu(conv), (other,))
            return True
    return False


def _replace(traced: GraphModule, relu: Node, spent: list[Node], fused: nn.Module, others: tuple[Node, ...]) -> None:
    """Call `fused` in place of `relu`; `spent` are the nodes that it makes superfluous, the convolution last."""
    conv = spent[-1]
    with traced.graph.inserting_before(relu):
        new = traced.graph.call_module(place(traced, conv, fused), (conv.args[0], *others))
    relu.replace_all_uses_with(new)
    for node in (relu, *spent):
        traced.graph.erase_node(node)


def _fusable(traced: GraphModule, node: Node, relu: Node, addition: Node | None = None) -> nn.Conv2d | None:
    """Return the convolution that `node` calls if cuDNN can do it, and as well at the place of `relu`."""
    conv = called(traced, node, nn.Conv2d)
    if conv is None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    # What is written in place between the two might be the convolution's input, or another view of it.
    disturbed = any(_writes(traced, later) for later in _between(node, relu) if later is not addition)
    return None if disturbed else conv


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _is_relu(traced: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        return called(traced, node, nn.ReLU) is not None
    return node.op in ("call_function", "call_method") and node.target in _RELUS and bool(node.args)


def _addends(node: Node) -> list[tuple[Node, Node]]:
    """Return both orders of the two different tensors that `node` adds; only the first if it writes into that."""
    adds = node.op in ("call_function", "call_method") and not node.kwargs  # which could be alpha or out
    if not adds or node.target not in _ADDS | _ADDS_IN_PLACE or len(node.args) != 2:
        return []
    left, right = node.args
    if not isinstance(left, Node) or not isinstance(right, Node) or left is right:
        return []
    return [(left, right)] if node.target in _ADDS_IN_PLACE else [(left, right), (right, left)]


def _writes(traced: GraphModule, node: Node) -> bool:
    """Tell whether `node` may overwrite a tensor, by PyTorch's conventions for names and arguments."""
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function":
        return False
    named = getattr(node.target, "__name__", "").endswith("_")
    flagged = bool(node.kwargs.get("inplace")) or "out" in node.kwargs or any(arg is True for arg in node.args)
    return named or flagged or node.target in _WRITING_OPERATORS
