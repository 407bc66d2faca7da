"""What the server means, whatever the transport: live, ready, metadata, infer. HTTP and gRPC only translate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headrace import __version__
from headrace.clock import now_ns
from headrace.errors import HeadraceError, UnknownModel
from headrace.wire.datatypes import FROM_DTYPE

if TYPE_CHECKING:
    from headrace.control import ServedModel
    from headrace.frontend.link import BackendLink
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


@dataclass(slots=True)
class Service:
    """One frontend's view of the server. `link` is None while no backend is ready."""

    name: str  # of the model
    link: BackendLink | None = None
    draining: bool = False
    totals: Totals = field(default_factory=Totals)

    def is_ready(self) -> bool:
        """Tell whether an infer request would be taken now."""
        return self.link is not None and not self.draining

    def model(self, name: str, version: str | None) -> ServedModel:
        """Return what is known of a model. Raises UnknownModel, or while none is ready EngineStopped's kin."""
        if name != self.name:
            raise UnknownModel(f"there is no model {name}; this server has {self.name}")
        model = self._require().model
        if version not in (None, model.version):
            raise UnknownModel(f"model {name} has no version {version}; it has {model.version}")
        return model

    async def infer(self, inputs: Sequence[memoryview], rows: int) -> list[bytes]:
        """Return the outputs' bytes. Raises as `BackendLink.infer` does, and while not ready."""
        began_ns = now_ns()
        try:
            outputs = await self._require().infer(inputs, rows)
        except HeadraceError:
            self.totals.fail_count += 1
            self.totals.fail_ns += now_ns() - began_ns
            raise
        self.totals.success_count += 1
        self.totals.inference_count += rows
        self.totals.success_ns += now_ns() - began_ns
        return outputs

    def _require(self) -> BackendLink:
        if self.link is None or self.draining:
            raise NotReady(
                "the server is not ready: its model is being loaded, or it is stopping; try again in a while"
            )
        return self.link


class NotReady(HeadraceError):
    """No backend is ready."""

    http_status = 503
    grpc_code = "UNAVAILABLE"


def server_metadata() -> dict[str, object]:
    return {"name": SERVER_NAME, "version": __version__, "extensions": list(EXTENSIONS)}


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
