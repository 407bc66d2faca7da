"""Tensors as words and numbers: what one row of a tensor is. No torch, since the supervisor needs it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float64": 8,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One named tensor of a model: what a row of it is."""

    name: str
    dtype: str  # torch's name, a key of DTYPE_BYTES
    features: tuple[int, ...]  # shape of one row

    @property
    def row_bytes(self) -> int:
        return math.prod(self.features) * DTYPE_BYTES[self.dtype]


def row_bytes(tensor: Tensor) -> int:
    """Return the bytes of one row of [rows, *features]."""
    return math.prod(tensor.shape[1:]) * tensor.element_size()
