"""Traces: what is found out about a sampled request on its way. Making spans of it is `frontend/spans`, where it is on.

Nothing here needs OpenTelemetry's packages, and a server without --trace-endpoint never loads them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from headrace.errors import HeadraceError, InvalidOption
from headrace.frontend.board import STAGES

if TYPE_CHECKING:
    from headrace.control import ServedModel
    from headrace.frontend.http.head import Head
    from headrace.frontend_job import TracingSettings
    from headrace.transport.descriptors import Descriptor

PACKAGES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
DESCRIPTION = 200  # characters of an error's text
# A server's span has failed where its client cannot help it. Source: semantic conventions, "Recording errors" of gRPC.
FAILED_CODES = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}

Attributes = Mapping[str, str | int]


@dataclass(slots=True)
class Trace:
    """One sampled request. Times are readings of the one clock; 0: not reached."""

    began_ns: int  # its head, or its message, has come
    status: int = 0  # of HTTP, once an answer is sent
    error: BaseException | None = None
    model: ServedModel | None = None
    rows: int = 0
    called_ns: int = 0  # it has been read and decoded
    answered_ns: int = 0  # its outputs have been encoded
    told: Descriptor | None = None  # what the backend said of it

    def called(self, model: ServedModel, rows: int, now_ns: int) -> None:
        self.model, self.rows, self.called_ns = model, rows, now_ns

    def answered(self, told: Descriptor, now_ns: int) -> None:
        self.told, self.answered_ns = told, now_ns

    def stages(self) -> dict[str, tuple[int, int]]:
        """Return when each of `board.STAGES` began and ended; none of a request that was not answered well."""
        told = self.told
        if told is None:
            return {}
        stamps = (
            *(self.called_ns, told.received_ns, told.started_ns),
            *(told.computed_ns, told.responded_ns, self.answered_ns),
        )
        return dict(zip(STAGES, pairwise(stamps), strict=True))

    def attributes(self) -> dict[str, str | int]:
        """Return what is known whatever the transport."""
        known: dict[str, str | int] = {}
        if self.model is not None:
            known |= {"headrace.model.name": self.model.name, "headrace.model.version": self.model.version}
            known["headrace.request.rows"] = self.rows
        if self.told is not None:
            known |= {"headrace.batch.rows": self.told.batch_rows, "headrace.lane": self.told.lane}
        if self.error is not None:
            known["error.type"] = type(self.error).__name__
        return known


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request's span is called, and what it says."""

    name: str
    attributes: Attributes
    has_failed: bool  # and not by the client's fault
    description: str = ""  # of the failure


def http_outcome(head: Head, route: str, scheme: str, trace: Trace) -> Outcome:
    """Return a request over HTTP. Source: OpenTelemetry's semantic conventions 1.44, "HTTP server"."""
    attributes = {
        "http.request.method": head.method,
        "http.route": route,
        "url.path": head.path,
        "url.scheme": scheme,
        "network.protocol.version": "1.0" if head.is_http_1_0 else "1.1",
    } | trace.attributes()
    if trace.status:
        attributes["http.response.status_code"] = trace.status
    has_failed = trace.status >= 500
    return Outcome(
        name=f"{head.method} {route}",
        attributes=attributes,
        has_failed=has_failed,
        description=_description(trace) if has_failed else "",
    )


def rpc_outcome(method: str, trace: Trace) -> Outcome:
    """Return a request over gRPC; each one of a stream. `method` is SERVICE/METHOD. Source: as above, "gRPC"."""
    code = _grpc_code(trace.error)
    attributes = {"rpc.system.name": "grpc", "rpc.method": method, "rpc.response.status_code": code}
    has_failed = code in FAILED_CODES
    return Outcome(
        name=method,
        attributes=attributes | trace.attributes(),
        has_failed=has_failed,
        description=_description(trace) if has_failed else "",
    )


def _description(trace: Trace) -> str:
    return str(trace.error or "")[:DESCRIPTION]


def _grpc_code(error: BaseException | None) -> str:
    if error is None:
        return "OK"
    if isinstance(error, HeadraceError):
        return error.grpc_code
    return "INTERNAL" if isinstance(error, Exception) else "CANCELLED"


def require_usable(settings: TracingSettings) -> None:
    """Look whether traces could be sent, before anything is started. Raises InvalidOption.

    What the exporter finds wrong with its variables (OTEL_*) it logs, which is seen here and not in the frontends.
    """
    require_packages()
    from headrace.frontend.spans import make_exporter  # noqa: PLC0415  which needs them

    make_exporter(settings)


def require_packages(find: Callable[[str], object | None] = importlib.util.find_spec) -> None:
    """Refuse to trace without what that needs. Raises InvalidOption."""
    try:
        missing = [name for name in PACKAGES if find(name) is None]
    except ModuleNotFoundError as error:  # not even what it is a part of
        missing = [str(error.name)]
    if missing:
        raise InvalidOption(
            f"--trace-endpoint: needs OpenTelemetry's SDK and its OTLP exporter ({missing[0]} is not installed); pip"
            " install 'headrace[tracing]', or leave the option out"
        )
