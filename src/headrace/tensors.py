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
BYTES = "bytes"  # a dtype beside torch's: elements of any length up to a limit
LENGTH_BYTES = 4  # in front of each of them, little-endian, as the protocol has it


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One named tensor of a model: what a row of it is.

    Elements of dtype BYTES lie in cells of one size: their length, then themselves, then what was there before.
    """

    name: str
    dtype: str  # torch's name, a key of DTYPE_BYTES, or BYTES
    features: tuple[int, ...]  # shape of one row
    max_bytes: int = 0  # of an element of dtype BYTES; 0: of other dtypes, or not known

    @property
    def is_bytes(self) -> bool:
        return self.dtype == BYTES

    @property
    def row_bytes(self) -> int:
        size = LENGTH_BYTES + self.max_bytes if self.is_bytes else DTYPE_BYTES[self.dtype]
        return math.prod(self.features) * size


def row_bytes(tensor: Tensor) -> int:
    """Return the bytes of one row of [rows, *features]."""
    return math.prod(tensor.shape[1:]) * tensor.element_size()
