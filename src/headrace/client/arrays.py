"""A caller's arrays and the model's tensors: numpy's in and out, and torch's where the caller has imported it.

Elements of BYTES are `bytes` in arrays of objects; lists of them will do. numpy has no bfloat16: such an input is a
float32 array, rounded to the nearest, or torch's own; such an output is float32.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import InvalidRequest
from headrace.wire.datatypes import numpy_dtype
from headrace.wire.elements import cells, objects

if TYPE_CHECKING:
    from headrace.tensors import TensorSpec

Array = NDArray[Any]
BFLOAT16 = "bfloat16"


@dataclass(frozen=True, slots=True)
class Rows:
    """A request's inputs: arrays [rows, *features] in the model's order, of the dtypes that travel."""

    rows: int
    arrays: tuple[Array, ...]


def as_rows(inputs: object, specs: Sequence[TensorSpec]) -> Rows:
    """Return the inputs of a request: a mapping by name, or an array where the model has one input.

    -1 among a spec's features stands for any size. Raises InvalidRequest, which says the value and what fits: nothing
    is converted silently, but for bfloat16.
    """
    named = _by_name(inputs, specs)
    arrays = tuple(_checked(named[spec.name], spec) for spec in specs)
    rows = {len(array) for array in arrays}
    if len(rows) != 1:
        raise InvalidRequest(f"the inputs have {' and '.join(map(str, sorted(rows)))} rows; all need the same number")
    if not (count := rows.pop()):
        raise InvalidRequest("the inputs have no rows; send at least 1")
    return Rows(count, arrays)


def view_of(data: memoryview, spec: TensorSpec, shape: Sequence[int]) -> Array:
    """Return bytes as an array of the dtype that travels: bfloat16's bits as uint16, BYTES as objects, copied."""
    if spec.is_bytes:
        return objects([bytes(element) for element in cells(data, spec)], shape)
    return np.frombuffer(data, numpy_dtype(spec.dtype)).reshape(shape)


def as_output(array: Array, dtype: str) -> Array:
    """Return a copy of an output's view, bfloat16 widened to float32, which is exact."""
    if dtype == BFLOAT16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.copy()


def require_fixed_size(specs: Sequence[TensorSpec]) -> None:
    """Raise InvalidRequest if an input has no size that is known before it is there."""
    for spec in specs:
        if spec.is_bytes or min(spec.features, default=1) < 0:
            what = "BYTES" if spec.is_bytes else f"of features {list(spec.features)}, some of any size"
            raise InvalidRequest(f"input {spec.name} is {what}, so no memory can be made for it; give arrays to infer")


def _by_name(inputs: object, specs: Sequence[TensorSpec]) -> Mapping[str, object]:
    names = [spec.name for spec in specs]
    if not isinstance(inputs, Mapping):
        if len(specs) != 1:
            raise InvalidRequest(f"one array was given; the model takes {', '.join(names)}: give a dict by these names")
        return {names[0]: inputs}
    if set(inputs) != set(names):
        raise InvalidRequest(
            f"inputs {', '.join(map(str, inputs)) or 'none'} were given; the model takes {', '.join(names)}"
        )
    return inputs


def _checked(value: object, spec: TensorSpec) -> Array:
    if spec.is_bytes:
        return _elements(value, spec)
    array = _as_array(value, spec)
    wanted = numpy_dtype(spec.dtype)
    if array.dtype != wanted:
        given = "float32" if spec.dtype == BFLOAT16 else spec.dtype
        raise InvalidRequest(
            f"input {spec.name} has dtype {array.dtype}; the model takes {spec.dtype}: use .astype({given!r})"
        )
    _require_shape(array, spec)
    return array


def _require_shape(array: Array, spec: TensorSpec) -> None:
    features = array.shape[1:]
    if len(array.shape) != len(spec.features) + 1 or any(
        want not in (-1, got) for want, got in zip(spec.features, features, strict=True)
    ):
        shape = ", ".join(["rows", *map(str, spec.features)])
        raise InvalidRequest(f"input {spec.name} has shape {list(array.shape)}; the model takes [{shape}]")


def _elements(value: object, spec: TensorSpec) -> Array:
    """Return `bytes`, and text as UTF-8, as an array of objects: nested lists, or numpy's objects or strings."""
    try:
        given = np.asarray(value, object)
    except ValueError as error:
        raise InvalidRequest(f"input {spec.name} is no regular array: {error}") from error
    wrong = next((each for each in given.flat if not isinstance(each, bytes | str)), None)
    if wrong is not None:
        raise InvalidRequest(
            f"input {spec.name} holds {type(wrong).__name__}; the model takes BYTES: give a list of bytes or str,"
            " one for each row"
        )
    array = objects([each.encode() if isinstance(each, str) else bytes(each) for each in given.flat], given.shape)
    if array.ndim == 1 and spec.features == (1,):
        array = array[:, np.newaxis]
    _require_shape(array, spec)
    return array


def _as_array(value: object, spec: TensorSpec) -> Array:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        if tensor.dtype is torch.bfloat16:
            return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)  # type: ignore[no-any-return]
        value = tensor.numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidRequest(f"input {spec.name} is no regular array: {error}") from error
    if spec.dtype == BFLOAT16 and array.dtype == np.float32:
        return _rounded(array)
    return array


def _rounded(array: Array) -> Array:
    """Return float32 as bfloat16's bits, rounded to the nearest and ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(array), quiet_nan, rounded).astype(np.uint16)
