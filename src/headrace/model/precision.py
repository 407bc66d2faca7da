"""Whether float32 work may be rounded to TF32 (10 instead of 23 bits of mantissa) on NVIDIA's tensor cores.

The two attributes are PyTorch's older interface. They are used because torch.compile reads them, also in
torch 2.14, and because reading one interface after setting the other is an error. Some releases warn that
they will go one day. Source: PyTorch docs, "TensorFloat-32 (TF32) on Ampere (and later) devices".
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from headrace.config import Precision
from headrace.errors import ModelError


def apply(precision: Precision) -> None:
    """Set the process's precision: "tf32" is PyTorch's default (convolutions), "float32" rounds nothing."""
    with _without_advice():
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = False


def actual() -> tuple[bool, bool]:
    """Return what PyTorch itself says now: (convolutions may round, matrix products may round).

    Raises ModelError if the model's own code has set the newer interface, after which PyTorch refuses to say.
    """
    try:
        with _without_advice():
            return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    except RuntimeError as error:
        raise ModelError(
            "the model's code sets torch.backends' fp32_precision, so the run's precision cannot be told;"
            " take that out and use --precision"
        ) from error


@contextmanager
def _without_advice() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings", category=UserWarning)
        yield
