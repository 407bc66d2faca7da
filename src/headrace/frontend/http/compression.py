"""gzip and deflate, as Content-Encoding has them. What takes long is done in a thread: zlib lets the loop go on."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence

from headrace.errors import InvalidRequest
from headrace.frontend.http.head import Refused

WORTH_BYTES = 1024  # less is sent as it is
LONG_BYTES = 64 << 10  # more is not done on the loop
LEVEL = 1  # the fastest: tensors hardly compress
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's words for the formats; "deflate" is zlib's own


async def decompressed(data: memoryview, encoding: str, limit: int) -> memoryview:
    """Return a body as it was before `encoding`. Raises Refused 415, 413 beyond `limit` bytes, and InvalidRequest."""
    if encoding in ("", "identity"):
        return data
    if encoding not in _WINDOW_BITS:
        raise Refused(415, f"Content-Encoding {encoding[:40]} is not taken; send gzip, deflate or neither")
    machine = zlib.decompressobj(_WINDOW_BITS[encoding])
    plain = b""
    if len(data) <= LONG_BYTES:
        plain = _more(machine, data, encoding, min(limit, LONG_BYTES) + 1)
        data = memoryview(machine.unconsumed_tail)
    if not machine.eof and data and len(plain) <= limit:
        plain += await asyncio.to_thread(_more, machine, data, encoding, limit + 1 - len(plain))
    if len(plain) > limit:
        raise Refused(413, f"the body has more than {limit} bytes once it is decompressed; send less")
    if not machine.eof or machine.unused_data:
        raise InvalidRequest(f"the body is no {encoding}: it ends too early, or something follows it")
    return memoryview(plain)


def _more(machine: zlib._Decompress, data: memoryview, encoding: str, limit: int) -> bytes:
    try:
        return machine.decompress(data, limit)
    except zlib.error as error:
        raise InvalidRequest(f"the body is no {encoding}: {error}") from error


def accepted(header: str) -> str | None:
    """Return the encoding that an Accept-Encoding header prefers of those we have; None for neither.

    Source: RFC 9110, 12.5.3; between equals, gzip.
    """
    best, best_weight = None, 0.0
    for part in header.lower().split(","):
        name, _, parameters = part.partition(";")
        encoding = {"*": "gzip"}.get(name.strip(), name.strip())
        weight = _weight(parameters.strip())
        if encoding in ("gzip", "deflate") and (weight, encoding == "gzip") > (best_weight, best == "gzip"):
            best, best_weight = encoding, weight
    return best if best_weight > 0 else None


def _weight(parameters: str) -> float:
    if not parameters.startswith("q="):
        return 1.0
    try:
        return float(parameters[2:])
    except ValueError:
        return 0.0


async def compressed(pieces: Sequence[bytes], encoding: str) -> bytes:
    """Return the pieces as one compressed body."""
    if sum(map(len, pieces)) <= LONG_BYTES:
        return _compress(pieces, encoding)
    return await asyncio.to_thread(_compress, pieces, encoding)


def _compress(pieces: Sequence[bytes], encoding: str) -> bytes:
    machine = zlib.compressobj(LEVEL, zlib.DEFLATED, _WINDOW_BITS[encoding])
    return b"".join([*(machine.compress(piece) for piece in pieces), machine.flush()])
