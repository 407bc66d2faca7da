"""What the server means, whatever the transport: live, ready, metadata, infer. HTTP and gRPC only translate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headrace import __version__
from headrace.clock import now_ns
from headrace.errors import HeadraceError, NotReady, UnknownModel
from headrace.wire.datatypes import FROM_DTYPE

if TYPE_CHECKING:
    from headrace.control import ServedModel
    from headrace.frontend.link import BackendLink, Call
    from headrace.tensors import TensorSpec

SERVER_NAME = "headrace"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "statistics")
PLATFORM = "pytorch"
BACKEND = "headrace"


@dataclass(slots=True)
class Totals:
    """Cumulative counts of one frontend; times in nanoseconds."""

    inference_count: int = 0  # rows
    success_count: int = 0  # requests
    success_ns: int = 0
    fail_count: int = 0
    fail_ns: int = 0
    last_inference_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class InferOptions:
    """What a client may say of a request, beside its tensors."""

    timeout_us: int = 0  # not computed if it has not begun by then; 0: no limit
    priority: int = 0  # 1 comes first, larger numbers later; 0: the middle


@dataclass(slots=True)
class Service:
    """One frontend's view of the server: the models, each version with its link to a backend."""

    names: tuple[str, ...]  # of models that the server has, ready or not
    links: dict[str, dict[str, BackendLink]] = field(default_factory=dict)  # by name, then version
    draining: bool = False
    totals: Totals = field(default_factory=Totals)

    def is_ready(self) -> bool:
        """Tell whether every model would take an infer request now."""
        return not self.draining and all(self.links.get(name) for name in self.names)

    def add(self, link: BackendLink) -> None:
        self.links.setdefault(link.model.name, {})[link.model.version] = link

    def remove(self, link: BackendLink) -> None:
        versions = self.links.get(link.model.name, {})
        if versions.get(link.model.version) is link:
            del versions[link.model.version]

    def model(self, name: str, version: str | None) -> ServedModel:
        """Return what is known of a model. Raises UnknownModel, or NotReady while it is not."""
        return self._link(name, version).model

    @contextmanager
    def call(self, name: str, version: str | None, rows: int, options: InferOptions = InferOptions()) -> Iterator[Call]:
        """Give a request room: write its inputs, await its answer and read its outputs within. Infer means this.

        Raises as `BackendLink.admit` and `Call.answer` do, UnknownModel, and NotReady.
        """
        began_ns = now_ns()
        deadline_ns = began_ns + options.timeout_us * 1000 if options.timeout_us else 0
        try:
            call = self._link(name, version).admit(rows, deadline_ns, options.priority)
            try:
                yield call
            finally:
                call.close()
        except HeadraceError:
            self.totals.fail_count += 1
            self.totals.fail_ns += now_ns() - began_ns
            raise
        self.totals.success_count += 1
        self.totals.inference_count += rows
        self.totals.success_ns += now_ns() - began_ns

    @property
    def in_flight(self) -> int:
        """How many requests have been taken and not answered."""
        return sum(link.in_flight for versions in self.links.values() for link in versions.values())

    def close(self) -> None:
        """Let go of all backends. No request may be under way."""
        for versions in self.links.values():
            for link in versions.values():
                link.close()

    def _link(self, name: str, version: str | None) -> BackendLink:
        if name not in self.names:
            raise UnknownModel(f"there is no model {name}; this server has {', '.join(self.names)}")
        versions = self.links.get(name)
        if self.draining or not versions:
            raise NotReady(f"model {name} is not ready: it is being loaded, or the server is stopping; try again")
        if version is None:
            return versions[max(versions, key=int)]
        if version not in versions:
            raise UnknownModel(f"model {name} has no version {version}; it has {', '.join(versions)}")
        return versions[version]


def server_metadata() -> dict[str, object]:
    return {"name": SERVER_NAME, "version": __version__, "extensions": list(EXTENSIONS)}


def repository_index(service: Service) -> list[dict[str, str]]:
    """Return every version of every model, with its state."""
    index = []
    for name in service.names:
        versions = tuple(service.links.get(name, ())) or ("",)
        state = "READY" if service.links.get(name) and not service.draining else "UNAVAILABLE"
        index += [{"name": name, "version": version, "state": state, "reason": ""} for version in versions]
    return index


def model_metadata(model: ServedModel) -> dict[str, object]:
    """Return the protocol's model metadata; a leading -1 stands for the rows."""
    return {
        "name": model.name,
        "versions": [model.version],
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


def model_statistics(model: ServedModel, totals: Totals) -> dict[str, object]:
    """Return Triton's statistics, of this frontend alone."""
    success = {"count": totals.success_count, "ns": totals.success_ns}
    nothing = {"count": 0, "ns": 0}
    return {
        "model_stats": [
            {
                "name": model.name,
                "version": model.version,
                "last_inference": totals.last_inference_ms,
                "inference_count": totals.inference_count,
                "execution_count": totals.success_count,
                "inference_stats": {
                    "success": success,
                    "fail": {"count": totals.fail_count, "ns": totals.fail_ns},
                    "queue": nothing,
                    "compute_input": nothing,
                    "compute_infer": success,
                    "compute_output": nothing,
                    "cache_hit": nothing,
                    "cache_miss": nothing,
                },
                "batch_stats": [],
            }
        ]
    }


def _tensor(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": FROM_DTYPE[spec.dtype], "shape": [-1, *spec.features]}


def _config_tensor(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "data_type": f"TYPE_{FROM_DTYPE[spec.dtype]}", "dims": list(spec.features) or [1]}
