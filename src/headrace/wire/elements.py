"""Elements of datatype BYTES: as the protocol packs them, and in the cells of a table's rows.

Packed, each element is its length in 4 bytes, little-endian, and then itself, one behind the other. In a table every
element has a cell of `max_bytes` and begins in the same way. Source: Triton's binary tensor data extension.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import InvalidRequest
from headrace.tensors import LENGTH_BYTES

if TYPE_CHECKING:
    from headrace.tensors import TensorSpec

CONTENT_TYPE, BASE64 = "content_type", "base64"  # a parameter of JSON tensors whose strings are base64
_LENGTH = struct.Struct("<I")


def pack(elements: Iterable[bytes | memoryview]) -> bytearray:
    """Return elements as the protocol packs them."""
    packed = bytearray()
    for element in elements:
        packed += _LENGTH.pack(len(element))
        packed += element
    return packed


def split(packed: memoryview, name: str) -> Iterator[memoryview]:
    """Yield what was packed. Raises InvalidRequest if it ends within an element."""
    at = 0
    while at < len(packed):
        begin = at + LENGTH_BYTES
        size = _LENGTH.unpack_from(packed, at)[0] if begin <= len(packed) else 0
        at = begin + size
        if at > len(packed):
            raise InvalidRequest(
                f"tensor {name} has {len(packed)} bytes, and an element ends {at - len(packed)} bytes behind them; each"
                " element needs its length in 4 bytes, little-endian, and then as many bytes"
            )
        yield packed[begin:at]


def objects(elements: Sequence[bytes], shape: Sequence[int]) -> NDArray[Any]:
    """Return elements as an array of objects. Raises ValueError if the shape has not as many."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def place(rows: memoryview, data: memoryview, spec: TensorSpec) -> None:
    """Write a tensor's bytes, as the protocol has them, into rows of a table. Raises as `fill` does."""
    if spec.is_bytes:
        fill(rows, data, spec)
    else:
        rows[:] = data


def fill(rows: memoryview, packed: memoryview, spec: TensorSpec) -> None:
    """Write packed elements into rows of a table, one cell each.

    Raises InvalidRequest if they are more or fewer than the rows have cells, or if one is longer than `max_bytes`.
    """
    fill_cells(rows, split(packed, spec.name), spec)


def fill_cells(rows: memoryview, elements: Iterable[bytes | memoryview], spec: TensorSpec) -> None:
    """Do what `fill` does, with elements one by one."""
    cell, at, count = LENGTH_BYTES + spec.max_bytes, 0, 0
    for element in elements:
        count += 1
        if at < len(rows):
            require_fits(len(element), spec, count - 1)
            _LENGTH.pack_into(rows, at, len(element))
            rows[at + LENGTH_BYTES : at + LENGTH_BYTES + len(element)] = element
            at += cell
    if count * cell != len(rows):
        raise InvalidRequest(
            f"tensor {spec.name} has {count} elements; its shape needs {len(rows) // cell}: send one for each"
        )


def require_fits(size: int, spec: TensorSpec, number: int) -> None:
    """Raise InvalidRequest if an element is longer than a cell has room."""
    if size > spec.max_bytes:
        raise InvalidRequest(
            f"element {number} of tensor {spec.name} has {size} bytes, and the model takes at most"
            f" {spec.max_bytes}; send less, or raise max_bytes in the model's description"
        )


def cells(rows: memoryview, spec: TensorSpec) -> Iterator[memoryview]:
    """Yield the elements in rows of a table. Raises InvalidRequest if a length is beyond its cell.

    The other process may write while this reads, so each length is read once.
    """
    cell = LENGTH_BYTES + spec.max_bytes
    for number, at in enumerate(range(0, len(rows), cell)):
        begin = at + LENGTH_BYTES
        (size,) = _LENGTH.unpack_from(rows, at)
        require_fits(size, spec, number)
        yield rows[begin : begin + size]


def raw(rows: memoryview, spec: TensorSpec) -> memoryview:
    """Return rows of a table as the protocol has a tensor's bytes: a view of numbers, a copy of elements."""
    return memoryview(pack(cells(rows, spec))) if spec.is_bytes else rows


def least_bytes(spec: TensorSpec, rows: int) -> int:
    """Return how many bytes so many rows of a tensor have at least, as the protocol has them."""
    return rows * (math.prod(spec.features) * LENGTH_BYTES if spec.is_bytes else spec.row_bytes)


def from_json(data: object, spec: TensorSpec, rows: int, parameters: Mapping[str, Any]) -> memoryview:
    """Return the packed elements of a tensor that came as JSON: strings, nested by its shape or flat.

    With the parameter `content_type` "base64" they are that, else text. Raises InvalidRequest.
    """
    texts = list(_flat(data, spec.name, 1 + len(spec.features)))
    needed = rows * math.prod(spec.features)
    if len(texts) != needed:
        raise InvalidRequest(f"input {spec.name} has {len(texts)} strings; its shape needs {needed}")
    given = parameters.get(CONTENT_TYPE)
    if given not in (None, BASE64, "str"):
        raise InvalidRequest(f"input {spec.name} has {CONTENT_TYPE} {given!r:.80}; it must be {BASE64} or left out")
    try:
        elements = [base64.b64decode(text, validate=True) if given == BASE64 else text.encode() for text in texts]
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"input {spec.name} holds a string that is no {given or 'UTF-8'}: {error}") from error
    return memoryview(pack(elements))


def to_json(packed: memoryview, name: str, *, as_base64: bool) -> tuple[list[str], bool]:
    """Return packed elements as strings, and whether they are base64: wished for, or because they are no text."""
    elements = list(split(packed, name))
    if not as_base64:
        try:
            return [str(element, "utf-8") for element in elements], False
        except UnicodeDecodeError:
            pass
    return [base64.b64encode(element).decode() for element in elements], True


def require_packed_bytes(spec: TensorSpec, given: object, rows: int, where: str) -> int:
    """Return the bytes of a packed tensor as a request says it. Raises InvalidRequest if no such tensor can have so."""
    least, most = least_bytes(spec, rows), rows * spec.row_bytes
    if type(given) is not int or not least <= given <= most:
        raise InvalidRequest(
            f"input {spec.name} has {given!r:.80} bytes in {where}; {rows} rows of it have {least} to {most}: 4 for the"
            f" length of each element, and up to {spec.max_bytes} for itself; send less, or raise max_bytes in the"
            " model's description"
        )
    return given


def _flat(data: object, name: str, depth: int) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Sequence) and not isinstance(data, bytes) and depth:
        for each in data:
            yield from _flat(each, name, depth - 1)
    else:
        raise InvalidRequest(f"input {name} is BYTES; its data must be strings, nested by its shape or flat")
