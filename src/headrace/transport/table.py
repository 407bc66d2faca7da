"""A table of rows as tensors: one per input and output of the model, all over the same memory."""

from __future__ import annotations

from mmap import mmap
from typing import TYPE_CHECKING

import torch

from headrace.tensors import row_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.transport.layout import Layout


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a name in `layout.DTYPE_BYTES`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


class RowTable:
    """`inputs[i]` and `outputs[i]` are [layout.rows, *features], views of the memory; row r of all belongs together.

    Tensors of BYTES are uint8 [layout.rows, bytes of a row]: their cells, see `wire.elements`.
    """

    def __init__(self, layout: Layout, memory: mmap) -> None:
        self.layout = layout
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        specs = (*layout.inputs, *layout.outputs)
        tensors = []
        for spec, offset in zip(specs, layout.tensor_offsets(), strict=True):
            size = layout.rows * spec.row_bytes
            data = self._bytes[offset : offset + size]
            if not spec.is_bytes:
                data = data.view(torch_dtype(spec.dtype))
            tensors.append(data.view((layout.rows, spec.row_bytes) if spec.is_bytes else (layout.rows, *spec.features)))
        self.inputs: tuple[Tensor, ...] = tuple(tensors[: len(layout.inputs)])
        self.outputs: tuple[Tensor, ...] = tuple(tensors[len(layout.inputs) :])
        self._input_places = [(tensor.data_ptr(), row_bytes(tensor)) for tensor in self.inputs]
        self._output_places = [(tensor.data_ptr(), row_bytes(tensor)) for tensor in self.outputs]

    def memory(self) -> Tensor:
        """Return all tensors' memory as bytes, page-aligned, to be made known to a device."""
        return self._bytes[self.layout.tensors_offset :]

    def input_addresses(self, first_row: int) -> list[int]:
        """Return where a lease's inputs begin in this process's memory, one address per tensor."""
        return [address + first_row * size for address, size in self._input_places]

    def output_addresses(self, first_row: int) -> list[int]:
        return [address + first_row * size for address, size in self._output_places]
