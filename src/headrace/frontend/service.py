"""What the server means, whatever the transport: live, ready, metadata, infer. HTTP and gRPC only translate."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from headrace import __version__
from headrace.clock import now_ns
from headrace.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineStopped,
    HeadraceError,
    InvalidRequest,
    NotReady,
    QueueFull,
    UnknownModel,
)
from headrace.frontend.ledger import Ledger
from headrace.frontend.link import ModelFailed
from headrace.frontend.pool import Pool
from headrace.frontend.scale import BATCH_ROWS
from headrace.serve_config import MODEL_NAME
from headrace.wire.datatypes import FROM_DTYPE

if TYPE_CHECKING:
    from headrace.control import ServedModel, Verb, VersionStatus
    from headrace.frontend.board import ModelTotals
    from headrace.frontend.link import BackendLink, Call
    from headrace.frontend.tracing import Trace
    from headrace.tensors import TensorSpec

SERVER_NAME = "headrace"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")
SHARED_MEMORY = "system_shared_memory"  # Triton's name of the extension
PLATFORM = "pytorch"
BACKEND = "headrace"


@dataclass(frozen=True, slots=True, kw_only=True)
class InferOptions:
    """What a client may say of a request, beside its tensors."""

    timeout_us: int = 0  # not computed if it has not begun by then; 0: no limit
    priority: int = 0  # 1 comes first, larger numbers later; 0: the middle
    trace: Trace | None = None  # is told how it goes


class ModelControl(Protocol):
    """How a frontend has models loaded and unloaded."""

    async def change(self, verb: Verb, name: str) -> None:
        """Return when it is done in all frontends. Raises what it fails with."""


@dataclass(slots=True)
class Service:
    """One frontend's view of the server: the models, each version with its link to a backend."""

    names: tuple[str, ...]  # of models that the server has, ready or not
    pools: dict[str, dict[str, Pool]] = field(default_factory=dict)  # by name, then version
    draining: bool = False
    totals: Ledger = field(default_factory=Ledger)
    statuses: tuple[VersionStatus, ...] = ()  # what the supervisor says of all versions
    control: ModelControl | None = None  # None: clients may not change models
    retiring: list[BackendLink] = field(default_factory=list)  # get no more requests, and have some to answer

    def is_ready(self) -> bool:
        """Tell whether every model that should be there would take an infer request now."""
        if not self.statuses:
            return not self.draining and all(self.pools.get(name) for name in self.names)
        required = (status for status in self.statuses if status.required)
        return not self.draining and all(status.version in self.pools.get(status.name, {}) for status in required)

    def degraded(self) -> tuple[VersionStatus, ...]:
        """Return the versions that are served by fewer engines than there should be."""
        return tuple(status for status in self.statuses if status.is_degraded)

    def add(self, link: BackendLink) -> None:
        """Send requests there from now on; one to the same engine that is there gets no more."""
        self.totals.open(link.model)
        before = self.pools.setdefault(link.model.name, {}).setdefault(link.model.version, Pool()).add(link)
        if before is not None:
            self.retiring.append(before)

    def retire(self, link: BackendLink) -> None:
        """Send nothing more there. What is under way goes on; `remove` it when that has ended."""
        self.remove(link)
        self.retiring.append(link)

    def remove(self, link: BackendLink) -> None:
        versions = self.pools.get(link.model.name, {})
        pool = versions.get(link.model.version)
        if pool is not None and link in pool.links:
            pool.links.remove(link)
            if not pool.links:
                del versions[link.model.version]
                self.totals.let_go(link.model)
        if link in self.retiring:
            self.retiring.remove(link)

    def set_statuses(self, statuses: tuple[VersionStatus, ...]) -> None:
        self.statuses = statuses
        self.names = tuple(dict.fromkeys(status.name for status in statuses))

    def model(self, name: str, version: str | None) -> ServedModel:
        """Return what is known of a model. Raises UnknownModel, or NotReady while it is not.

        Without a version this is the newest, and it may be another one after the next await.
        """
        return self._pool(name, version).model

    def versions(self, name: str) -> tuple[str, ...]:
        """Return the versions of a model that are ready, oldest first."""
        return tuple(sorted(self.pools.get(name, ()), key=int))

    async def load(self, name: str, parameters: Mapping[str, object] | None = None) -> None:
        """Bring in what the repository now has of a model, without losing a request; return when it serves.

        `parameters` are the request's. Raises InvalidRequest for any, ControlOff, UnknownModel, and what the loading
        fails with: then what was there goes on.
        """
        await self._change("load", name, parameters, allowed=())

    async def unload(self, name: str, parameters: Mapping[str, object] | None = None) -> None:
        """Take a model out; return when no more requests are taken, though some may still be answered. See `load`."""
        await self._change("unload", name, parameters, allowed=("unload_dependents",))

    async def _change(
        self, verb: Verb, name: str, parameters: Mapping[str, object] | None, allowed: tuple[str, ...]
    ) -> None:
        refused = [parameter[:128] for parameter in parameters or () if parameter not in allowed]
        if refused:
            raise InvalidRequest(
                f"{verb} takes no parameter {', '.join(refused)}: models come from the server's own repository;"
                " leave it out"
            )
        if self.control is None:
            raise ControlOff(f"this server lets no client {verb} models; start it with --model-control explicit")
        if self.draining:
            raise NotReady("the server is stopping")
        if re.fullmatch(MODEL_NAME, name) is None:
            raise UnknownModel(f"{name[:128]!r} is no name of a model")
        await self.control.change(verb, name)

    @contextmanager
    def call(self, name: str, version: str | None, rows: int, options: InferOptions = InferOptions()) -> Iterator[Call]:
        """Give a request room: write its inputs, await its answer and read its outputs within. Infer means this.

        Raises as `BackendLink.admit` and `Call.answer` do, UnknownModel, and NotReady.
        """
        began_ns = now_ns()
        deadline_ns = began_ns + options.timeout_us * 1000 if options.timeout_us else 0
        row = self.totals.latest(name)
        try:
            pool = self._pool(name, version)
            row = self.totals.row(pool.model)
            if options.trace is not None:
                options.trace.called(pool.model, rows, began_ns)
            call = pool.admit(rows, deadline_ns, options.priority)
            try:
                yield call
            finally:
                call.close()
        except BaseException as error:  # of a client that leaves, a cancellation: no Exception
            if row is not None:
                row.failed(failure_kind(error), now_ns() - began_ns)
            raise
        if call.told is not None:
            ended_ns = now_ns()
            row.succeeded(began_ns, ended_ns, rows, call.told, call.engine)
            if options.trace is not None:
                options.trace.answered(call.told, ended_ns)

    def refused(self, name: str, error: HeadraceError, began_ns: int) -> None:
        """Count a request that was found wrong before it could become a call."""
        row = self.totals.latest(name)
        if row is not None:
            row.failed(failure_kind(error), now_ns() - began_ns)

    def sample(self) -> None:
        """Put on the board what is under way now. To be called from time to time: requests themselves do not."""
        for versions in self.pools.values():
            for pool in versions.values():
                self.totals.hold(pool)

    def free_share(self, name: str, version: str | None) -> float:
        """Return which share of a model's rows is free. Raises UnknownModel and NotReady."""
        return self._pool(name, version).free_share

    @property
    def in_flight(self) -> int:
        """How many requests have been taken and not answered."""
        return sum(link.in_flight for link in self._all_links())

    def close(self) -> None:
        """Let go of all backends. No request may be under way."""
        for link in self._all_links():
            link.close()

    def _all_links(self) -> list[BackendLink]:
        pools = [pool for versions in self.pools.values() for pool in versions.values()]
        return [*(link for pool in pools for link in pool.links), *self.retiring]

    def _pool(self, name: str, version: str | None) -> Pool:
        if name not in self.names:
            raise UnknownModel(f"there is no model {name}; this server has {', '.join(self.names)}")
        versions = self.pools.get(name, {})
        if self.draining:
            raise NotReady("the server is stopping")
        if version is None and versions:
            return versions[max(versions, key=int)]
        if version in versions:
            return versions[version]
        raise self._absent(name, version)

    def _absent(self, name: str, version: str | None) -> HeadraceError:
        """Return why a model has no link: something that a client should wait for, or not."""
        of_model = [status for status in self.statuses if status.name == name]
        asked = [status for status in of_model if version in (None, status.version)]
        known = sorted({status.version for status in of_model} | self.pools.get(name, {}).keys(), key=int)
        if version is not None and known and not asked:
            return UnknownModel(f"model {name} has no version {version}; it has {', '.join(known)}")
        which = f"model {name}" if version is None else f"version {version} of model {name}"
        if not of_model or any(status.required or status.state in ("READY", "LOADING") for status in asked):
            reasons = [status.reason for status in asked if status.required and status.reason]
            return NotReady(f"{which} is not ready: {reasons[0] if reasons else 'it is being loaded'}; try again")
        return UnknownModel(f"{which} is not loaded: {asked[-1].reason or asked[-1].state.lower()}")


class ControlOff(HeadraceError):
    """Clients may not load and unload models here."""

    http_status = 403
    grpc_code = "PERMISSION_DENIED"


_FAILURE_KINDS = (
    (QueueFull, "full"),
    (InvalidRequest, "invalid"),
    (UnknownModel, "invalid"),
    (DeadlineExceeded, "deadline"),
    (ModelFailed, "model"),
    (EngineStopped, "lost"),
    (NotReady, "unavailable"),
    (Cancelled, "cancelled"),
)


def failure_kind(error: BaseException) -> str:
    """Return which of `board.FAILURES` it was."""
    kind = next((kind for known, kind in _FAILURE_KINDS if isinstance(error, known)), None)
    if kind is not None:
        return kind
    if not isinstance(error, Exception):  # asyncio's, of a client that left
        return "cancelled"
    is_clients = isinstance(error, HeadraceError) and 400 <= error.http_status < 500  # as a body that does not come
    return "invalid" if is_clients else "internal"


def server_metadata(*, shared_memory: bool) -> dict[str, object]:
    """Return the protocol's server metadata; `shared_memory`: clients may name regions."""
    extensions = [*EXTENSIONS, SHARED_MEMORY] if shared_memory else list(EXTENSIONS)
    return {"name": SERVER_NAME, "version": __version__, "extensions": extensions}


def repository_index(service: Service, *, only_ready: bool = False) -> list[dict[str, str]]:
    """Return every version of every model, or those that are ready, with its state and, if it is not ready, why."""
    index = []
    for name in service.names:
        pools = service.pools.get(name, {})
        told = {status.version: status for status in service.statuses if status.name == name}
        for version in sorted({*told, *pools}, key=int) or [""]:
            state, reason = _state(version in pools and not service.draining, told.get(version))
            if state == "READY" or not only_ready:
                index.append({"name": name, "version": version, "state": state, "reason": reason})
    return index


def _state(is_linked: bool, told: VersionStatus | None) -> tuple[str, str]:
    if is_linked:
        return "READY", told.reason if told is not None and told.is_degraded else ""
    if told is None or told.state == "READY":  # it is not in this frontend
        return "UNAVAILABLE", "not connected"
    return told.state, told.reason


def model_metadata(model: ServedModel, versions: Sequence[str] = ()) -> dict[str, object]:
    """Return the protocol's model metadata; a leading -1 stands for the rows. `versions` are those that are ready."""
    return {
        "name": model.name,
        "versions": list(versions) or [model.version],
        "platform": PLATFORM,
        "inputs": [_tensor(spec) for spec in model.inputs],
        "outputs": [_tensor(spec) for spec in model.outputs],
    }


def model_config(model: ServedModel) -> dict[str, object]:
    """Return Triton's model configuration, as far as clients read it; dims leave the rows out."""
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": BACKEND,
        "max_batch_size": model.max_batch_size,
        "input": [_config_tensor(spec) for spec in model.inputs],
        "output": [_config_tensor(spec) for spec in model.outputs],
        "dynamic_batching": {},
    }


def model_statistics(model: ServedModel, totals: Ledger) -> dict[str, object]:
    """Return Triton's statistics of one model's version, of all frontends."""
    return {"model_stats": [_statistics(totals.of(model))]}


def all_statistics(totals: Ledger) -> dict[str, object]:
    """Return Triton's statistics of all that was ever ready."""
    return {"model_stats": [_statistics(model) for model in totals.all()]}


def _statistics(model: ModelTotals) -> dict[str, object]:
    """Copies and model run as one, so both copies are in compute_infer, and take 0 ns by themselves.

    The three are counted alike: perf_analyzer ends where they differ. Of a batch that failed in part, only the part
    that was answered counts. Source: Triton's statistics extension.
    """
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": model.last_ms,
        "inference_count": model.rows,
        "execution_count": model.batches,
        "inference_stats": {
            "success": _duration(model.requests, model.request_ns),
            "fail": _duration(sum(model.failure_count.values()), sum(model.failure_ns.values())),
            "queue": _duration(model.requests, model.stage_ns["queue"]),
            "compute_input": _duration(model.requests, 0),
            "compute_infer": _duration(model.requests, model.stage_ns["compute"]),
            "compute_output": _duration(model.requests, 0),
            "cache_hit": _duration(0, 0),
            "cache_miss": _duration(0, 0),
        },
        "batch_stats": [
            {
                "batch_size": BATCH_ROWS.name(index),
                "compute_input": _duration(round(count), 0),
                "compute_infer": _duration(round(count), round(model.batch_ns[index])),
                "compute_output": _duration(round(count), 0),
            }
            for index, count in enumerate(model.batch_counts)
            if count
        ],
    }


def _duration(count: int, nanoseconds: int) -> dict[str, int]:
    return {"count": count, "ns": nanoseconds}


def _tensor(spec: TensorSpec) -> dict[str, object]:
    told: dict[str, object] = {"name": spec.name, "datatype": FROM_DTYPE[spec.dtype], "shape": [-1, *spec.features]}
    if spec.is_bytes:
        told["parameters"] = {"max_bytes": spec.max_bytes}
    return told


def _config_tensor(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "data_type": _config_type(spec), "dims": list(spec.features) or [1]}


def _config_type(spec: TensorSpec) -> str:
    """Return Triton's name in model configurations, where BYTES is called a string."""
    return "TYPE_STRING" if spec.is_bytes else f"TYPE_{FROM_DTYPE[spec.dtype]}"
