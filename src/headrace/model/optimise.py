"""From the eager model to the module that lanes capture: same inputs, same answers, less work for the GPU.

The module takes tensors as clients send them and returns answers as clients read them (the *wire* form); in between it
computes in the precision and layout that were asked for. How far its answers are from the model's is measured here too,
against the model in float64, and refused above a limit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from headrace.errors import ModelError
from headrace.model.fused import Untraceable, fold_batch_norms, fuse_epilogues, trace
from headrace.model.pointwise import rewrite_strided_pointwise
from headrace.model.quantise import NOTHING, quantise_linears, require_possible
from headrace.model.stem import pad_channels, space_to_depth
from headrace.processes import describe

ComputePrecision = Literal["float32", "tf32", "bf16", "fp16", "int8", "fp8"]
StemForm = Literal["keep", "pad", "space-to-depth"]
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)

WireInputs = Sequence[Tensor] | Mapping[str, Tensor]  # positional, or by the names of the model's own arguments

_DTYPES: Final[Mapping[ComputePrecision, torch.dtype]] = {
    "float32": torch.float32,
    "tf32": torch.float32,  # the process-wide switch is headrace.model.precision
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.bfloat16,  # of all that is not quantised
    "fp8": torch.bfloat16,
}
_UNIT_ROUNDOFF: Final[Mapping[ComputePrecision, float]] = {"tf32": 2**-11, "bf16": 2**-8, "fp16": 2**-11}
_QUANTISED_ROUNDING: Final[Mapping[ComputePrecision, float]] = {"int8": 2**-7, "fp8": 2**-5}  # root mean square
_ROUNDINGS = 64
_QUANTISED_LAYERS = 64
_LEAST_AGREEMENT = 0.99
_FLOAT32_TOLERANCE = 2e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalise:
    """What the model expects of an image's channels: (value / 255 - mean) / std, in RGB."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiseConfig:
    """How the model computes. Everything but the precision leaves answers as they are, up to rounding."""

    precision: ComputePrecision = "tf32"
    channels_last: bool = True  # if the model has a Conv2d: tensor cores read images in that order
    fold_batch_norm: bool = True  # in the model's own precision, before the cast
    fuse_epilogues: bool = False  # convolution, bias, ReLU and residual in one kernel of cuDNN
    stem: StemForm = "keep"  # what becomes of convolutions over few channels; exact
    pointwise_as_matmul: bool = False  # strided convolutions of 1x1; exact
    normalise: Normalise | None = None  # then uint8 inputs [rows, height, width, 3] are normalised on the device


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimised:
    """The module to serve, and in sentences what was done and what was not and why."""

    module: nn.Module
    applied: tuple[str, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReport:
    """How far answers are from the model's: the relative L2 error of each row, in the worst of its outputs."""

    max_relative_error: float
    mean_relative_error: float
    top1_agreement: float | None  # share of rows; None unless the model returns one tensor [rows, classes]
    rows: int
    reference: Literal["float64", "float32"]  # float32 where the model's own code cannot compute in float64


@dataclass(frozen=True, slots=True)
class _Rewrite:
    done: str  # what its name is, once done
    undone: str
    nothing: str  # why it found nothing to do
    run: Callable[[GraphModule], int]


_FOLD = _Rewrite(
    "batch norm folded", "batch norm not folded", "no batch norm directly follows a convolution", fold_batch_norms
)
_STEMS: Final = {
    "space-to-depth": _Rewrite(
        "space to depth",
        "space to depth not applied",
        "no convolution has stride 2, at most 4 input channels and a kernel of 2 to 8",
        space_to_depth,
    ),
    "pad": _Rewrite(
        "channels padded", "channels not padded", "no convolution has fewer than 4 input channels", pad_channels
    ),
}
_POINTWISE = _Rewrite(
    "strided 1x1 convolutions as matrix products",
    "no strided 1x1 convolution made a matrix product",
    "the model has none",
    rewrite_strided_pointwise,
)
_EPILOGUES = _Rewrite(
    "epilogues fused", "epilogues not fused", "no ReLU directly follows a convolution or its sum", fuse_epilogues
)


class Wire(nn.Module):
    """A model that takes and returns tensors in wire form.

    Floating inputs are cast to the model's dtype; with `normalise`, uint8 inputs [rows, height, width, 3] become
    normalised [rows, 3, height, width]; other inputs stay as they are. Floating outputs come back as float32, all
    outputs contiguous.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, *, channels_last: bool, normalise: Normalise | None
    ) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.normalises = normalise is not None
        scale, shift = _affine(normalise) if normalise else ([], [])
        device = _device_of(model)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.float32, device=device), persistent=False)

    def forward(self, *args: object, **kwargs: object) -> object:
        args, kwargs = tree_map(self._from_wire, (args, kwargs))
        return tree_map(_to_wire, self.model(*args, **kwargs))

    def _from_wire(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        if self.normalises and _is_image(value):
            # In float32, also in front of a smaller type: compiled, it is one kernel either way.
            value = (value.to(torch.float32) * self.scale + self.shift).permute(0, 3, 1, 2)
        if not value.is_floating_point():
            return value
        return value.to(self.dtype, memory_format=self.memory_format if value.ndim == 4 else torch.preserve_format)


def optimise(model: nn.Module, config: OptimiseConfig, device: torch.device | None = None) -> Optimised:
    """Return a copy of `model` that computes as `config` says, between inputs and outputs in wire form.

    `model` is float32 and in eval mode; it is not changed. The copy is on `device`, or where the model is. A rewrite
    that the model does not allow is left out and named in `skipped`. Raises ModelError if the model cannot be copied,
    or not be cast to the precision, and DeviceUnavailable if the device cannot compute in it.
    """
    device = device or _device_of(model)
    if config.precision in ("int8", "fp8"):
        require_possible(config.precision, device)
    applied: list[str] = []
    skipped: list[str] = []
    dtype = _DTYPES[config.precision]
    with torch.no_grad():
        module = _rewritten(_copy(model).to(device), config, applied, skipped)
        _cast(module, dtype)
        channels_last = config.channels_last and any(isinstance(part, nn.Conv2d) for part in model.modules())
        if channels_last:
            _lay_out_channels_last(module)
        quantised = _quantised(module, config.precision, skipped)
        wire = Wire(module, dtype, channels_last=channels_last, normalise=config.normalise)
    applied += [quantised or f"computed in {'bf16' if dtype == torch.bfloat16 else config.precision}"]
    applied += ["channels last"] if channels_last else []
    applied += ["uint8 images normalised on the device"] if config.normalise else []
    return Optimised(
        module=wire.eval().requires_grad_(requires_grad=False), applied=tuple(applied), skipped=tuple(skipped)
    )


def measure_error(
    optimised: Callable[..., object],
    reference: nn.Module,
    wire_inputs: WireInputs,
    *,
    normalise: Normalise | None = None,
) -> ErrorReport:
    """Compare the answers of `optimised` to `wire_inputs` with those of the float32 eager model `reference`.

    `optimised` may be the module that `optimise` returned, or that compiled or captured; `normalise` must be what it
    was made with. Errors are relative to `reference` computed in float64, top-1 agreement to float32. Only floating
    outputs are compared, or all if there are none. Raises ModelError if either cannot be run, or if their outputs
    differ in shape or have no row for each row of the first input.
    """
    rows = _first(wire_inputs).shape[0]
    with torch.no_grad():
        answers = _outputs(optimised, wire_inputs, "as optimised")
        eager = _outputs(reference, _as_reference_takes(wire_inputs, normalise, torch.float32), "as it is")
        exact = _exact_outputs(reference, _as_reference_takes(wire_inputs, normalise, torch.float64))
        expected = exact or eager
        _require_same_shapes(answers, expected, rows)
        errors = torch.stack([_row_errors(a, b) for a, b in zip(answers, expected, strict=True)]).amax(dim=0)
    return ErrorReport(
        max_relative_error=float(errors.max()),
        mean_relative_error=float(errors.mean()),
        top1_agreement=_top1_agreement(answers, eager),
        rows=rows,
        reference="float64" if exact else "float32",
    )


def tolerance(precision: ComputePrecision) -> float:
    """Return the largest relative L2 error of a row that is put down to rounding: 64 roundings of the precision.

    That is 3.1e-2 in fp16 and TF32 and 0.25 in bf16. Seen on an H100 (torch 2.11, all rewrites, 20 torchvision models
    with calibrated random weights): up to 59 roundings, ResNet-18 3; beyond the limit were EfficientNet-B4 (fp16 176,
    bf16 87) and RegNet-X 8GF (fp16 70), which blow rounding up. Trained, on photographs, on a CPU: EfficientNet-lite0
    16 in bf16, 15 in fp16. In float32 the limit is 2e-4, as sums in another order and Winograd transforms come on top
    of 6e-8 per rounding: seen up to 2.4e-5. A rewrite gone wrong is expected to show as an error of the order of 1.

    In int8 and fp8, what is not quantised may err as in bf16, and 64 quantised layers in a row come on top: 0.27 and
    0.43. Each rounds both operands, independently of the others, so squares add. A row of normally distributed values
    loses 2^-7 in int8 (steps of its largest value / 127) and less than 2^-5 in e4m3 (which rounds by up to 2^-4).
    """
    if precision in _QUANTISED_ROUNDING:
        return math.hypot(tolerance("bf16"), math.sqrt(2 * _QUANTISED_LAYERS) * _QUANTISED_ROUNDING[precision])
    return _FLOAT32_TOLERANCE if precision == "float32" else _ROUNDINGS * _UNIT_ROUNDOFF[precision]


def require_accuracy(report: ErrorReport, precision: ComputePrecision) -> None:
    """Raise ModelError unless the largest error is finite and at most `tolerance(precision)`.

    In int8 and fp8 the best class must also be that of float32 in 99 % of the rows, where the model has classes.
    """
    error, limit = report.max_relative_error, tolerance(precision)
    if error <= limit:  # which nan is not
        _require_agreement(report, precision)
        return
    remedy = "use --precision float32" if precision != "float32" else "switch the model's rewrites off"
    raise ModelError(
        f"in {precision}, the model's answers are wrong by {error:.2g} (relative L2 error of the worst of {report.rows}"
        f" rows, against {report.reference}), and {limit:.2g} is allowed; {remedy}"
    )


def accuracy_rows(precision: ComputePrecision) -> int:
    """Return how many rows to measure the error on, where there are so many: enough for one in a hundred."""
    return 128 if precision in _QUANTISED_ROUNDING else 16


def _require_agreement(report: ErrorReport, precision: ComputePrecision) -> None:
    agreement = report.top1_agreement
    if precision not in _QUANTISED_ROUNDING or agreement is None or agreement >= _LEAST_AGREEMENT:
        return
    raise ModelError(
        f"in {precision}, the best class is float32's in {agreement:.1%} of {report.rows} rows, and"
        f" {_LEAST_AGREEMENT:.0%} is needed; use --precision bf16, or, if the rows are few, more example inputs"
    )


def _quantised(module: nn.Module, precision: ComputePrecision, skipped: list[str]) -> str | None:
    """Quantise what the precision asks for; return what was done, None if it was nothing."""
    if precision not in ("int8", "fp8"):
        return None
    count = quantise_linears(module, precision)
    skipped += [] if count else [f"nothing computed in {precision}: {NOTHING}"]
    return f"{count} linear layer{'s' * (count != 1)} in {precision}, the rest in bf16" if count else None


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # the user's classes say how they are copied
        raise ModelError(f"the model cannot be copied ({describe(error)}); make copy.deepcopy work on it") from error


def _rewritten(module: nn.Module, config: OptimiseConfig, applied: list[str], skipped: list[str]) -> nn.Module:
    wanted = [_FOLD] * config.fold_batch_norm
    wanted += [_STEMS[config.stem]] if config.stem != "keep" else []
    wanted += [_POINTWISE] * config.pointwise_as_matmul + [_EPILOGUES] * config.fuse_epilogues
    if not wanted:
        return module
    try:
        traced = trace(module)
    except Untraceable as reason:
        skipped += [f"{', '.join(rewrite.undone for rewrite in wanted)}: {reason}"]
        return module
    counts = [rewrite.run(traced) for rewrite in wanted]
    applied += [f"{rewrite.done} ({n})" for rewrite, n in zip(wanted, counts, strict=True) if n]
    skipped += [f"{rewrite.undone}: {rewrite.nothing}" for rewrite, n in zip(wanted, counts, strict=True) if not n]
    if not any(counts):
        return module
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        return
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_complex():
            raise ModelError(f"{name} is complex, and {dtype} would drop its imaginary part; use --precision float32")
    if dtype == torch.float16:
        for name, parameter in module.named_parameters():  # buffers may be masks, whose -1e9 may well become -inf
            _check_fits_fp16(name, parameter)
    module.to(dtype)


def _check_fits_fp16(name: str, parameter: Tensor) -> None:
    lost = parameter.to(torch.float16).isinf() & parameter.isfinite()
    if lost.any():
        worst, limit = float(parameter[lost].abs().max()), torch.finfo(torch.float16).max
        raise ModelError(f"{name} holds values up to {worst:.6g}, and fp16 ends at {limit:.0f}; use --precision bf16")


def _lay_out_channels_last(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.ndim == 4:  # Module.to would raise for those of 5
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _affine(normalise: Normalise) -> tuple[list[float], list[float]]:
    """Return scale and shift such that value * scale + shift is (value / 255 - mean) / std."""
    scale = [1 / (255 * std) for std in normalise.std]
    return scale, [-mean / std for mean, std in zip(normalise.mean, normalise.std, strict=True)]


def _device_of(model: nn.Module) -> torch.device:
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def _is_image(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8 and tensor.ndim == 4 and tensor.shape[-1] == 3


def _to_wire(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return (value.to(torch.float32) if value.is_floating_point() else value).contiguous()


def _first(inputs: WireInputs) -> Tensor:
    return next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs))


def _as_reference_takes(inputs: WireInputs, normalise: Normalise | None, dtype: torch.dtype) -> WireInputs:
    def change(tensor: Tensor) -> Tensor:
        if normalise is not None and _is_image(tensor):
            tensor = _normalised(tensor, normalise)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    if isinstance(inputs, Mapping):
        return {name: change(tensor) for name, tensor in inputs.items()}
    return [change(tensor) for tensor in inputs]


def _normalised(images: Tensor, normalise: Normalise) -> Tensor:
    """Normalise by the formula, in float64: what Wire does is to be checked against it."""
    mean, std = (images.new_tensor(values, dtype=torch.float64) for values in (normalise.mean, normalise.std))
    return ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def _exact_outputs(reference: nn.Module, inputs: WireInputs) -> list[Tensor] | None:
    try:
        return _outputs(_copy(reference).double(), inputs, "in float64")
    except ModelError:  # its own code makes float32 tensors, say; the caller falls back on them, and reports it
        return None


def _outputs(run: Callable[..., object], inputs: WireInputs, form: str) -> list[Tensor]:
    try:
        answer = run(**inputs) if isinstance(inputs, Mapping) else run(*inputs)
    except Exception as error:  # the model's own code may raise anything
        raise ModelError(
            f"the model cannot be run {form} ({describe(error)}); use inputs that it takes and --precision float32"
        ) from error
    tensors = [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ModelError("the model returns no tensor; return at least one, with a row for each row of the input")
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return floating or tensors


def _require_same_shapes(answers: list[Tensor], expected: list[Tensor], rows: int) -> None:
    got, wanted = [list(tensor.shape) for tensor in answers], [list(tensor.shape) for tensor in expected]
    if got != wanted:
        raise ModelError(
            f"the optimised model's outputs are {got} where the model's are {wanted}; switch its rewrites off"
        )
    if any(shape[:1] != [rows] for shape in wanted):
        raise ModelError(f"outputs of shape {wanted} answer {rows} rows; every output needs a row for each")


def _row_errors(answer: Tensor, expected: Tensor) -> Tensor:
    got, wanted = (rows.double().reshape(len(rows), -1) for rows in (answer, expected))
    # The smallest float keeps 0 / 0 at 0: a row that should be and is zero is right.
    norms = torch.linalg.vector_norm(wanted, dim=1)
    errors: Tensor = torch.linalg.vector_norm(got - wanted, dim=1) / norms.clamp_min(torch.finfo(torch.float64).tiny)
    return errors


def _top1_agreement(answers: list[Tensor], eager: list[Tensor]) -> float | None:
    if len(eager) != 1 or eager[0].ndim != 2:
        return None
    agreeing = int((answers[0].argmax(dim=1) == eager[0].argmax(dim=1)).sum())
    return agreeing / len(eager[0])
