"""Shared memory that clients name: its calls over HTTP. Source: Triton, "System Shared Memory Extension"."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from headrace.control import RegionSpec
from headrace.errors import NotOffered
from headrace.frontend.http.answers import Reply, json_reply
from headrace.frontend.http.routes import read_json
from headrace.frontend.regions import NO_CUDA_MEMORY

if TYPE_CHECKING:
    from headrace.frontend.http.routes import Parameters, Routes
    from headrace.frontend.regions import SharedRegions

REGION = "/region/{region}"


def add_shared_memory(routes: Routes, regions: SharedRegions) -> None:
    """Add the calls. perf_analyzer unregisters all regions before it begins, also where none can be registered."""
    system = _System(regions)
    for begin, status, register, unregister in (
        ("/v2/systemsharedmemory", system.status, system.register, system.unregister),
        ("/v2/cudasharedmemory", _cuda_status, _cuda_register, _cuda_unregister),
    ):
        for path in (begin, begin + REGION):
            routes.add("GET", path + "/status", status)
            routes.add("POST", path + "/unregister", unregister)
        routes.add("POST", begin + REGION + "/register", register)


class _RegisterBody(msgspec.Struct):
    key: str
    byte_size: int
    offset: int = 0


class _System:
    def __init__(self, regions: SharedRegions) -> None:
        self._regions = regions

    def status(self, parameters: Parameters, _body: bytes) -> Reply:
        return json_reply(self._regions.own.status(parameters.get("region")))

    async def register(self, parameters: Parameters, body: bytes) -> Reply:
        self._regions.own.require_offered()
        asked = read_json(body, _RegisterBody, "register")
        spec = RegionSpec(name=parameters["region"], key=asked.key, offset=asked.offset, byte_size=asked.byte_size)
        await self._regions.register(spec)
        return Reply()

    async def unregister(self, parameters: Parameters, _body: bytes) -> Reply:
        await self._regions.unregister(parameters.get("region"))
        return Reply()


def _cuda_status(_parameters: Parameters, _body: bytes) -> Reply:
    return json_reply([])


def _cuda_register(_parameters: Parameters, _body: bytes) -> Reply:
    raise NotOffered(NO_CUDA_MEMORY)


def _cuda_unregister(_parameters: Parameters, _body: bytes) -> Reply:
    return Reply()
