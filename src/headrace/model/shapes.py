"""A dimension that differs from request to request, such as a sequence's length: padded to one of a few sizes.

Every size is a model of its own to the lanes: fixed shapes, captured. A request takes the smallest size that holds it;
its inputs are padded, and the padding is cut off the outputs again. Whether that leaves the answers alone is up to the
model (a mask), so it is tried at start, and refused if it does not.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from headrace.errors import InvalidOption, InvalidRequest, ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.tensors import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicDim:
    """Which dimension of which inputs is the dynamic one, alike in all of them, and to what sizes it is padded."""

    dims: Mapping[str, int]  # input's name -> dimension, 1 or above; 0 are the rows
    sizes: tuple[int, ...]  # ascending
    padding: Mapping[str, float] = field(default_factory=dict)  # input's name -> value to pad with; 0 where not given

    def validate(self) -> None:
        """Raise InvalidOption for what cannot be."""
        if not self.dims or min(self.dims.values()) < 1:
            raise InvalidOption(f"dynamic dims {dict(self.dims)}: name an input and its dimension, 1 or above")
        if not self.sizes or self.sizes[0] < 1 or list(self.sizes) != sorted(set(self.sizes)):
            raise InvalidOption(f"dynamic sizes {list(self.sizes)}: give ascending sizes, each once and at least 1")
        unknown = self.padding.keys() - self.dims.keys()
        if unknown:
            raise InvalidOption(f"padding of {', '.join(sorted(unknown))}: these inputs have no dynamic dimension")

    def size_of(self, tensors: Mapping[str, Tensor]) -> int:
        """Return the size that a request's inputs share. Raises InvalidRequest if they do not, or are too large."""
        found = {name: tensors[name].shape[dim] for name, dim in self.dims.items() if tensors[name].ndim > dim}
        if len(found) < len(self.dims) or len(set(found.values())) != 1:
            named = ", ".join(f"{name} {list(tensors[name].shape)}" for name in self.dims)
            raise InvalidRequest(f"the dynamic dimension of {named} must be there, and the same in all")
        size = next(iter(found.values()))
        if not 1 <= size <= self.sizes[-1]:
            raise InvalidRequest(
                f"a dynamic dimension of {size} is outside 1 to {self.sizes[-1]}, the largest size that was prepared"
            )
        return size

    def padded_size(self, size: int) -> int:
        return self.sizes[bisect_left(self.sizes, size)]

    def pad(self, tensors: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
        """Return the inputs with the dynamic dimension filled up to `size`."""
        return {
            name: _padded(tensor, self.dims[name], size, self.padding.get(name, 0)) if name in self.dims else tensor
            for name, tensor in tensors.items()
        }


def dynamic_outputs(
    small: Sequence[TensorSpec], large: Sequence[TensorSpec], sizes: tuple[int, int]
) -> list[int | None]:
    """Return for each output which dimension follows the dynamic one, or None: by its shapes at two sizes."""
    return [_follows(a.features, b.features, sizes) for a, b in zip(small, large, strict=True)]


def cut(outputs: Sequence[Tensor], dims: Sequence[int | None], size: int) -> list[Tensor]:
    """Return outputs without the padding."""
    return [output if dim is None else output.narrow(dim, 0, size) for output, dim in zip(outputs, dims, strict=True)]


def require_padding_is_ignored(
    model: nn.Module, example: Mapping[str, Tensor], dynamic: DynamicDim, dims: Sequence[int | None], tolerance: float
) -> None:
    """Raise ModelError if the model's answer to the example depends on how far it is padded.

    `model` is flat, taking tensors in the example's order and returning a tuple. Errors are relative to the largest
    value of an output.
    """
    size = dynamic.size_of(example)
    with torch.no_grad():
        plain = model(*example.values())
        for larger in (each for each in dynamic.sizes if each > size):
            padded = cut(model(*dynamic.pad(example, larger).values()), dims, size)
            for number, (got, wanted) in enumerate(zip(padded, plain, strict=True)):
                error = _difference(got, wanted)
                if error > tolerance:
                    raise ModelError(
                        f"padding the example from {size} to {larger} changes output {number} by {error:.2g} of its"
                        f" largest value, and {tolerance:.2g} is allowed; give the model a mask of what is padding, or"
                        " serve one fixed size"
                    )


def _padded(tensor: Tensor, dim: int, size: int, value: float) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_full(shape, value)], dim) if shape[dim] else tensor


def _follows(small: tuple[int, ...], large: tuple[int, ...], sizes: tuple[int, int]) -> int | None:
    changed = [number for number, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    if not changed:
        return None
    if len(changed) > 1 or (small[changed[0]], large[changed[0]]) != sizes:
        raise ModelError(
            f"an output is {list(small)} at size {sizes[0]} and {list(large)} at {sizes[1]}: it must keep its shape, or"
            " follow the dynamic size in one dimension"
        )
    return changed[0] + 1


def _difference(got: Tensor, wanted: Tensor) -> float:
    if not wanted.is_floating_point():
        return float((got != wanted).any())
    scale = float(wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny))
    return float((got - wanted).abs().max()) / scale
