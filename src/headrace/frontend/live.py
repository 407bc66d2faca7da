"""What the live page is made of, as one JSON value: cumulative counts, from which the page takes differences.

So the server keeps no history, any frontend may answer, and a page that missed an answer goes on with the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from headrace import __version__
from headrace.clock import now_ns, seconds
from headrace.frontend.scale import BATCH_ROWS, RESPONSE_NS

if TYPE_CHECKING:
    from headrace.frontend.board import ModelTotals
    from headrace.frontend.gpu import GpuReading
    from headrace.frontend.service import Service

Json = dict[str, object]


def ready_models(service: Service) -> dict[tuple[str, str], bool]:
    """Return whether each model's version would take a request now; one that never was ready has version ""."""
    known = [(model.name, model.version) for model in service.totals.all()]
    names = {name for name, _ in known}
    known += [(name, "") for name in service.names if name not in names]
    return {(name, version): not service.draining and version in service.pools.get(name, {}) for name, version in known}


def live(service: Service, gpus: Sequence[GpuReading]) -> Json:
    """Return the server's state now. Times are nanoseconds of the server's monotonic clock."""
    at_ns, board = now_ns(), service.totals.board
    models = {(model.name, model.version): model for model in service.totals.all()}
    limits = {
        (pool.model.name, pool.model.version): pool.model.max_batch_size
        for versions in service.pools.values()
        for pool in versions.values()
    }
    engines = {(status.name, status.version): status for status in service.statuses}
    return {
        "server": {
            "name": "headrace",
            "version": __version__,
            "ready": service.is_ready(),
            "degraded": bool(service.degraded()),
            "frontends": board.frontends,
            "started_ns": board.started_ns,
            "uptime_s": round(seconds(at_ns - board.started_ns), 3),
        },
        "at_ns": at_ns,
        "models": [
            {
                "name": key[0],
                "version": key[1],
                "ready": is_ready,
                "max_batch_size": limits.get(key),
                "engines": engines[key].engines if key in engines else None,
                "engines_ready": engines[key].engines_ready if key in engines else None,
                "totals": _totals(models[key]) if key in models else None,
            }
            for key, is_ready in ready_models(service).items()
        ],
        "gpus": [asdict(gpu) for gpu in gpus],
    }


def _totals(model: ModelTotals) -> Json:
    return {
        "restarts": model.restarts,
        "in_flight": model.in_flight,
        "rows_free": model.rows_free,
        "rows_room": model.rows_room,
        "requests": model.requests,
        "rows": model.rows,
        "failures": model.failure_count,
        "stages_ns": model.stage_ns,
        "responses": responses(model.response_counts),
        "batches": _batches(model.batch_counts),
        "lanes": _lanes(model.lane_batches, model.lane_ns),
        "engines": _engines(model),
    }


def responses(counts: Sequence[int]) -> Sequence[Mapping[str, float]]:
    """Return the buckets that are not empty; `upper_ns` of the last possible one is its smallest value."""
    return [
        {"lower_ns": RESPONSE_NS.lower(index), "upper_ns": RESPONSE_NS.name(index), "count": count}
        for index, count in enumerate(counts)
        if count
    ]


def _batches(counts: Sequence[float]) -> Sequence[Mapping[str, float]]:
    return [{"rows": BATCH_ROWS.name(index), "count": round(count, 3)} for index, count in enumerate(counts) if count]


def _engines(model: ModelTotals) -> Sequence[Mapping[str, int]]:
    counts = zip(model.engine_requests, model.engine_rows, strict=True)
    return [
        {"engine": engine, "requests": requests, "rows": rows}
        for engine, (requests, rows) in enumerate(counts)
        if requests
    ]


def _lanes(batches: Sequence[float], busy_ns: Sequence[float]) -> Sequence[Mapping[str, float]]:
    return [
        {"lane": lane, "batches": round(count, 3), "busy_ns": round(busy_ns[lane])}
        for lane, count in enumerate(batches)
        if count
    ]
