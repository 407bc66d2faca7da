"""Linear layers in 8 bits, through torchao: weights once, inputs at every call, each row with a scale of its own.

torchao is an optional package, imported when a precision asks for it. With the first layer it sets TorchInductor's
options of the whole process to what it recommends for such models, which also makes compiling take longer.
"""

from __future__ import annotations

from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.errors import DeviceUnavailable, ModelError

Quantised = Literal["int8", "fp8"]
LEAST_SIZE: Final = 512  # inputs and outputs of a layer: below, rounding the inputs costs what the product saves
MULTIPLE: Final = 16  # of both sizes, which the FP8 kernels need
NOTHING: Final = f"no nn.Linear has both sizes at least {LEAST_SIZE} and multiples of {MULTIPLE}"
_FP8_CAPABILITY = (8, 9)
_LEAST_INT8_ROWS = 32  # cuBLAS multiplies int8 matrices of more than 16 rows only


class Int8Linear(nn.Linear):
    """A quantised linear layer that fills its inputs up to `least_rows` rows, with zeros; answers are the same."""

    least_rows: int

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name that nn.Linear has
        rows = input[..., 0].numel()
        if rows >= self.least_rows:
            return super().forward(input)
        filled = functional.pad(input.reshape(rows, -1), (0, 0, 0, self.least_rows - rows))
        return super().forward(filled)[:rows].reshape(*input.shape[:-1], -1)


def require_possible(scheme: Quantised, device: torch.device) -> None:
    """Raise ModelError if torchao is not installed, DeviceUnavailable if the device cannot compute in `scheme`."""
    if scheme == "fp8":
        require_fp8(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)
    _torchao(scheme)


def require_fp8(capability: tuple[int, int] | None) -> None:
    """Raise DeviceUnavailable unless a GPU of this compute capability multiplies FP8; None stands for a CPU."""
    if capability is not None and capability >= _FP8_CAPABILITY:
        return
    here = "this is a CPU" if capability is None else f"this GPU has {capability[0]}.{capability[1]}"
    raise DeviceUnavailable(
        f"--precision fp8 needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper and later), and {here};"
        " use --precision int8 or bf16"
    )


def quantise_linears(module: nn.Module, scheme: Quantised) -> int:
    """Change the large linear layers of `module`, bfloat16 and on its device, in place, and return how many there are.

    Those are the modules of type nn.Linear itself with both sizes at least `LEAST_SIZE` and multiples of `MULTIPLE`:
    subclasses may compute otherwise, and the projections of nn.MultiheadAttention are no such modules.
    """
    linears = [part for part in module.modules() if type(part) is nn.Linear and _pays(part)]
    quantize, config = _torchao(scheme)
    for linear in linears:
        quantize(linear, config)
        if scheme == "int8":
            linear.__class__ = Int8Linear  # as torch's own parametrizations do: names, hooks and sharing stay
            cast("Int8Linear", linear).least_rows = _LEAST_INT8_ROWS if linear.weight.is_cuda else 1
    _leave_fused_encoders(module, set(linears))
    return len(linears)


def _leave_fused_encoders(module: nn.Module, quantised: set[nn.Module]) -> None:
    """Have transformer encoders call their layers: their fused kernel reads weights, and fails on quantised ones.

    Uncompiled they see that by themselves; under torch.compile they do not (torch 2.14). Source: the conditions of the
    "sparsity fast path" in torch/nn/modules/transformer.py.
    """
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoder | nn.TransformerEncoderLayer) and quantised & set(part.modules()):
            if isinstance(part, nn.TransformerEncoder):
                part.use_nested_tensor = False
            else:
                part.activation_relu_or_gelu = 0  # read for the choice of the kernel only


def _pays(linear: nn.Linear) -> bool:
    sizes = (linear.in_features, linear.out_features)
    return min(sizes) >= LEAST_SIZE and not any(size % MULTIPLE for size in sizes)


def _torchao(scheme: Quantised) -> tuple[Any, Any]:
    """Return torchao's `quantize_` and its configuration of `scheme`. Raises ModelError if it is not installed."""
    try:
        from torchao import quantization  # noqa: PLC0415  optional, and slow to import
    except ImportError as error:
        raise ModelError(
            f"--precision {scheme} needs the package torchao ({error}); pip install 'headrace[quantised]'"
        ) from error
    if scheme == "int8":
        return quantization.quantize_, quantization.Int8DynamicActivationInt8WeightConfig()
    by_row = quantization.PerRow()
    return quantization.quantize_, quantization.Float8DynamicActivationFloat8WeightConfig(granularity=by_row)
