"""A tensor that lies in shared memory of the client's, as a request's parameters say. Alike over HTTP and gRPC.

Source: Triton, "Shared-Memory Extension".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.errors import InvalidRequest

REGION = "shared_memory_region"
OFFSET = "shared_memory_offset"
BYTE_SIZE = "shared_memory_byte_size"


@dataclass(frozen=True, slots=True)
class RegionPlace:
    """A part of a registered region; whether there is such a region is not known here."""

    region: str  # by which it was registered
    offset: int  # bytes from the region's begin
    byte_size: int


def region_place(tensor: str, parameters: Mapping[str, object]) -> RegionPlace | None:
    """Return where the parameters of a tensor put it; None if they name no region. Raises InvalidRequest."""
    if REGION not in parameters:
        return None
    region = parameters[REGION]
    offset, size = parameters.get(OFFSET, 0), parameters.get(BYTE_SIZE)
    if not isinstance(region, str) or not region:
        raise InvalidRequest(f"{tensor}: {REGION} must be the name of a region")
    if type(offset) is not int or type(size) is not int or offset < 0 or size < 0:
        raise InvalidRequest(
            f"{tensor}: {OFFSET} is {offset!r} and {BYTE_SIZE} is {size!r}; both must be numbers of bytes"
        )
    return RegionPlace(region, offset, size)
