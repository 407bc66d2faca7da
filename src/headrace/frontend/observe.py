"""What people and monitoring read of a server over HTTP: the live page with what it is made of, and /metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

import msgspec

from headrace.clock import now_ns, seconds
from headrace.frontend import metrics
from headrace.frontend.live import live, ready_models

if TYPE_CHECKING:
    from headrace.frontend.gpu import GpuWatch
    from headrace.frontend.service import Service

# Only what comes from this server runs, shows or is asked for, and no other page may frame it.
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/numbers.js": ("numbers.js", "text/javascript; charset=utf-8"),
    "/page/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
PATHS = (*_FILES, "/live.json", "/metrics")  # to be answered to GET


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, 200, of any HTTP library."""

    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class Observer:
    """Answers PATHS for one frontend."""

    def __init__(self, service: Service, watch: GpuWatch) -> None:
        self._service = service
        self._watch = watch

    async def reply(self, path: str) -> Reply:
        if path in _FILES:
            return page_file(path)
        gpus = await self._watch.look()
        service = self._service
        service.sample()
        if path == "/live.json":
            body, kind = msgspec.json.encode(live(service, gpus)), "application/json"
        else:
            up_s = seconds(now_ns() - service.totals.board.started_ns)
            now = metrics.Now(ready=ready_models(service), versions=service.statuses, gpus=gpus, started_ago_s=up_s)
            body, kind = metrics.render(service.totals.all(), now), metrics.CONTENT_TYPE
        return Reply(body, _headers(kind))


def page_file(path: str) -> Reply:
    name, kind = _FILES[path]
    return Reply((resources.files("headrace.frontend") / "page" / name).read_bytes(), _headers(kind))


def _headers(kind: str) -> dict[str, str]:
    return {
        "Content-Type": kind,
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
