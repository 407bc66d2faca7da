"""A caller's arrays: what fits, what is refused and why, and bfloat16, which numpy lacks."""

import numpy as np
import pytest
import torch

from headrace.client.arrays import as_output, as_rows
from headrace.errors import InvalidRequest
from headrace.tensors import TensorSpec

FLOATS = TensorSpec(name="floats", dtype="float32", features=(3,))
IDS = TensorSpec(name="ids", dtype="int64", features=(-1,))
HALF = TensorSpec(name="half", dtype="bfloat16", features=(2,))


def test_one_array_is_the_only_inputs():
    given = as_rows(np.ones((2, 3), np.float32), [FLOATS])
    assert given.rows == 2
    np.testing.assert_array_equal(given.arrays[0], np.ones((2, 3)))


def test_a_dicts_arrays_come_in_the_models_order_and_sizes_that_are_free_may_be_any():
    given = as_rows({"ids": np.zeros((2, 7), np.int64), "floats": np.ones((2, 3), np.float32)}, [FLOATS, IDS])
    assert [array.shape for array in given.arrays] == [(2, 3), (2, 7)]


def test_torchs_tensors_are_taken_as_they_are():
    given = as_rows(torch.arange(6, dtype=torch.float32, requires_grad=True).reshape(3, 2).T, [FLOATS])
    np.testing.assert_array_equal(given.arrays[0], [[0, 2, 4], [1, 3, 5]])


@pytest.mark.parametrize(
    ("inputs", "specs", "words"),
    [
        (np.zeros((2, 4), np.float32), [FLOATS], r"shape \[2, 4\]; the model takes \[rows, 3\]"),
        (np.zeros(3, np.float32), [FLOATS], r"shape \[3\]"),
        (np.zeros((2, 3)), [FLOATS], r"dtype float64; the model takes float32: use .astype\('float32'\)"),
        (np.zeros((0, 3), np.float32), [FLOATS], "no rows"),
        ([[1, 2], [3]], [FLOATS], "no regular array"),
        (np.zeros((2, 3), np.float32), [FLOATS, IDS], "give a dict"),
        ({"other": np.zeros((2, 3), np.float32)}, [FLOATS], "inputs other were given; the model takes floats"),
        ({}, [FLOATS], "inputs none were given"),
        ({"floats": np.zeros((2, 3), np.float32), "ids": np.zeros((1, 1), np.int64)}, [FLOATS, IDS], "1 and 2 rows"),
        (np.zeros((2, 2)), [HALF], r"use .astype\('float32'\)"),
    ],
    ids=["features", "rank", "dtype", "no rows", "ragged", "one of two", "name", "none", "unequal rows", "float64"],
)
def test_what_does_not_fit_is_refused_with_value_and_limit(inputs, specs, words):
    with pytest.raises(InvalidRequest, match=words):
        as_rows(inputs, specs)


def test_floats_are_rounded_to_bfloat16_as_torch_does():
    values = np.concatenate(
        [
            np.random.default_rng(0).standard_normal(1000).astype(np.float32),
            np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3.3895e38, 1.00390625], np.float32),
        ]
    ).reshape(-1, 2)
    bits = as_rows(values, [HALF]).arrays[0]
    ours = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(ours, torch.from_numpy(values).to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    np.testing.assert_array_equal(as_rows(ours, [HALF]).arrays[0], bits)


def test_bfloat16_comes_back_as_the_float32_that_it_is():
    tensor = torch.randn(4, 2).to(torch.bfloat16)
    bits = tensor.view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(as_output(bits, "bfloat16"), tensor.float().numpy())
