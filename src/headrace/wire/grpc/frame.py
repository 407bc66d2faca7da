"""Infer messages as protobuf writes them, taken apart and put together around their raw tensors, which are not copied.

A protobuf library copies a `bytes` field when it parses a message and again when it is read, and twice more on the way
out. So only the fields around the raw tensors are the library's, and the tensors are views of the message that came.
Source: Protocol Buffers, "Encoding".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.errors import InvalidRequest

RAW_INPUTS = 7  # field of ModelInferRequest
RAW_OUTPUTS = 6  # field of ModelInferResponse
STREAM_RESPONSE = 2  # field of ModelStreamInferResponse
MAX_FIELDS = 4096  # of a request: each costs a step of Python, and no model has as many tensors

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_VARINT_BYTES = 10


@dataclass(frozen=True, slots=True)
class Frame:
    """A request without its raw inputs, itself a message, and the raw inputs in order."""

    head: bytes
    raw: tuple[memoryview, ...]


def split(message: bytes) -> Frame:
    """Take the raw inputs out of a ModelInferRequest. Raises InvalidRequest if this is no message."""
    view = memoryview(message)
    head: list[memoryview] = []
    raw: list[memoryview] = []
    kept = at = fields = 0
    try:
        while at < len(view):
            begin = at
            key, at = _varint(view, at)
            size, at = _value(view, at, key & 7)
            if key == RAW_INPUTS << 3 | _LENGTH:
                head.append(view[kept:begin])
                raw.append(view[at : at + size])
                kept = at + size
            at += size
            fields += 1
            if fields > MAX_FIELDS:
                raise InvalidRequest(f"the request has more than {MAX_FIELDS} fields; send less at once")
    except IndexError:
        at = len(view) + 1
    if at != len(view):
        raise InvalidRequest("the request is no protobuf message: it ends within a field")
    head.append(view[kept:])
    return Frame(b"".join(head), tuple(raw))


def join(head: bytes, raw: Sequence[bytes | memoryview], *, stream: bool = False) -> bytes:
    """Return a ModelInferResponse of a message's bytes and raw outputs; with `stream`, as a stream's response."""
    pieces: list[bytes | memoryview] = [head]
    for data in raw:
        pieces += (_key(RAW_OUTPUTS, len(data)), data)
    if stream:
        pieces.insert(0, _key(STREAM_RESPONSE, sum(map(len, pieces))))
    return b"".join(pieces)


def _value(view: memoryview, at: int, wire_type: int) -> tuple[int, int]:
    """Return how long a field's value is, and where it begins."""
    if wire_type == _LENGTH:
        return _varint(view, at)
    if wire_type == _VARINT:
        return 0, _varint(view, at)[1]
    if wire_type in _FIXED_BYTES:
        return _FIXED_BYTES[wire_type], at
    raise InvalidRequest(f"the request is no protobuf message: it has a field of wire type {wire_type}")


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """Return a number, and where it ends. Raises IndexError at the end of the message."""
    value = 0
    for position in range(_VARINT_BYTES):
        byte = view[at + position]
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return value, at + position + 1
    raise InvalidRequest(f"the request is no protobuf message: a number has more than {_VARINT_BYTES} bytes")


def _key(field: int, size: int) -> bytes:
    """Return what stands before a field of so many bytes."""
    data = bytearray()
    for number in (field << 3 | _LENGTH, size):
        rest = number
        while rest >= 0x80:
            data.append(rest & 0x7F | 0x80)
            rest >>= 7
        data.append(rest)
    return bytes(data)
