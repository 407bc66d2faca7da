"""The protocol's names of element types and torch's. Source: Open Inference Protocol, "Tensor Data Types"."""

from __future__ import annotations

import numpy as np

from headrace.tensors import BYTES

TO_DTYPE = {  # of numbers
    "BOOL": "bool",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "FP16": "float16",
    "BF16": "bfloat16",
    "FP32": "float32",
    "FP64": "float64",
}
FROM_DTYPE = {dtype: datatype for datatype, dtype in TO_DTYPE.items()} | {BYTES: "BYTES"}
BINARY_ONLY = ("FP16", "BF16")  # JSON has no such numbers


def numpy_dtype(dtype: str) -> np.dtype[np.generic]:
    """Return numpy's twin of torch's dtype, little-endian; for bfloat16, which numpy lacks, its bits as uint16."""
    return np.dtype("<u2" if dtype == "bfloat16" else dtype).newbyteorder("<")
