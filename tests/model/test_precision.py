import warnings
from collections.abc import Iterator

import pytest
import torch

from headrace.errors import ModelError
from headrace.model import precision


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = precision.actual()
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("asked", "convolutions_and_matrices"), [("tf32", (True, False)), ("float32", (False, False))])
def test_precision_is_set_and_read_back_without_a_warning(asked, convolutions_and_matrices):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision.apply(asked)
        assert precision.actual() == convolutions_and_matrices


def test_tf32_is_what_pytorch_does_by_itself():
    default = precision.actual()
    precision.apply("tf32")
    assert precision.actual() == default


def test_a_model_that_sets_the_newer_interface_is_told_so():
    precision.apply("tf32")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(ModelError, match="fp32_precision"):
            precision.actual()
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
