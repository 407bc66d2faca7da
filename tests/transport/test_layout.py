"""Where the parts of a ring's memory lie."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.tensors import DTYPE_BYTES, TensorSpec
from headrace.transport.layout import DESCRIPTOR, LINE, PAGE, TEXT, Layout


def specs(count):
    spec = st.builds(
        TensorSpec,
        name=st.just("tensor"),
        dtype=st.sampled_from(sorted(DTYPE_BYTES)),
        features=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    )
    return st.lists(spec, min_size=1, max_size=count).map(tuple)


@given(rows=st.integers(1, 50), inputs=specs(3), outputs=specs(3))
def test_no_two_parts_of_the_memory_overlap(rows, inputs, outputs):
    layout = Layout(rows=rows, inputs=inputs, outputs=outputs)
    offsets = list(layout.tensor_offsets())
    assert all(offset % PAGE == 0 for offset in offsets), "their memory can be registered with a device"
    parts = [(0, PAGE)]
    parts += [(layout.ring_offset(at), 3 * LINE + entries * DESCRIPTOR) for at, entries in enumerate(layout.entries)]
    parts += [(layout.text_offset(row), TEXT) for row in range(rows)]
    parts += [(offset, rows * spec.row_bytes) for offset, spec in zip(offsets, (*inputs, *outputs), strict=True)]
    ends = [begin + size for begin, size in parts]
    assert all(end <= begin for end, (begin, _) in zip(ends, parts[1:], strict=False))
    assert ends[-1] <= layout.total_bytes


@pytest.mark.parametrize("rows", [1, 63, 64])
def test_counters_have_cache_lines_of_their_own(rows):
    spec = TensorSpec(name="tensor", dtype="float32", features=(4,))
    layout = Layout(rows=rows, inputs=(spec,), outputs=(spec,))
    assert all(layout.ring_offset(direction) % LINE == 0 for direction in (0, 1))
