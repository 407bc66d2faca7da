"""A table of rows: every tensor of every type at its own place."""

from mmap import mmap

import pytest
import torch

from headrace.tensors import BYTES, DTYPE_BYTES, LENGTH_BYTES, TensorSpec
from headrace.transport.layout import PAGE, Layout
from headrace.transport.table import RowTable, torch_dtype

ROWS = 5
LAYOUT = Layout(
    rows=ROWS,
    inputs=(
        TensorSpec(name="image", dtype="float32", features=(2, 3)),
        TensorSpec(name="ids", dtype="int64", features=(1000,)),
        TensorSpec(name="flag", dtype="bool", features=()),
    ),
    outputs=(
        TensorSpec(name="scores", dtype="bfloat16", features=(7,)),
        TensorSpec(name="bytes", dtype="uint8", features=(3,)),
    ),
)


def table_of(layout=LAYOUT):
    return RowTable(layout, mmap(-1, layout.total_bytes))


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_type_that_a_spec_can_name_has_torchs_size(dtype):
    assert torch_dtype(dtype).itemsize == DTYPE_BYTES[dtype]
    spec = TensorSpec(name="tensor", dtype=dtype, features=(3,))
    table = table_of(Layout(rows=ROWS, inputs=(spec,), outputs=(spec,)))
    table.inputs[0].copy_(torch.ones(ROWS, 3))
    assert table.inputs[0].dtype == torch_dtype(dtype)
    assert table.inputs[0].tolist() == torch.ones(ROWS, 3).to(torch_dtype(dtype)).tolist()
    assert not table.outputs[0].any()


def test_tensors_have_a_row_for_every_row_and_the_shape_of_their_spec():
    table = table_of()
    assert [tuple(tensor.shape) for tensor in table.inputs] == [(5, 2, 3), (5, 1000), (5,)]
    assert [tuple(tensor.shape) for tensor in table.outputs] == [(5, 7), (5, 3)]
    assert all(tensor.is_contiguous() for tensor in (*table.inputs, *table.outputs))


def test_writing_one_tensor_leaves_the_others_as_they_are():
    table = table_of()
    tensors = (*table.inputs, *table.outputs)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    for number, tensor in enumerate(tensors):
        assert (tensor == torch.tensor(number + 1).to(tensor.dtype)).all()


def test_addresses_are_those_of_the_rows():
    table = table_of()
    for row in range(ROWS):
        assert table.input_addresses(row) == [tensor[row:].data_ptr() for tensor in table.inputs]
        assert table.output_addresses(row) == [tensor[row:].data_ptr() for tensor in table.outputs]


def test_the_memory_that_a_device_is_told_of_is_page_aligned_and_holds_all_tensors():
    table = table_of()
    memory = table.memory()
    begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    assert (begin % PAGE, memory.nbytes % PAGE) == (0, 0)
    for tensor in (*table.inputs, *table.outputs):
        assert begin <= tensor.data_ptr() <= tensor.data_ptr() + tensor.nbytes <= end


def test_elements_of_any_length_lie_in_cells_of_bytes():
    names = TensorSpec(name="names", dtype=BYTES, features=(2,), max_bytes=10)
    table = table_of(Layout(rows=ROWS, inputs=(names,), outputs=(LAYOUT.outputs[0],)))
    assert names.row_bytes == 2 * (LENGTH_BYTES + 10)
    assert (table.inputs[0].dtype, tuple(table.inputs[0].shape)) == (torch.uint8, (ROWS, names.row_bytes))
    assert table.input_addresses(3)[0] - table.input_addresses(0)[0] == 3 * names.row_bytes
