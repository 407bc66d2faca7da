"""What `headrace limits` found: written as limits.json, shown as tables and a picture. No torch: readers start fast."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.bench.summary import Environment, Limits, TorchFacts
from headrace.config import InputConfig, LanesConfig, ModelConfig, Precision, WireType, require

SCHEMA_VERSION = 1
REPORT_NAME = "limits.json"
PICTURE_NAME = "limits.png"

RING = "ring messages"


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """What limits are measured of: a model as lanes run it, and requests of these sizes."""

    device: str  # "cpu", "cuda" or "cuda:N"
    model: ModelConfig
    lanes: LanesConfig  # its buckets are the batch sizes; of the rest only how the model is changed and run counts
    wire: WireType
    image_size: int

    def validate(self) -> None:
        sizes = self.lanes.buckets
        require(bool(sizes) and sizes[0] >= 1, f"--batch-sizes {' '.join(map(str, sizes))}: a batch has at least 1 row")
        self.inputs().validate()

    def inputs(self) -> InputConfig:
        """Return what the model is measured on; values hardly matter, but zeros would draw less power."""
        return InputConfig(wire=self.wire, image_size=self.image_size, batch_size=self.lanes.buckets[-1])

    @property
    def gpu_index(self) -> int | None:
        """The CUDA index; None on the CPU."""
        kind, _, index = self.device.partition(":")
        return int(index or 0) if kind == "cuda" else None

    @property
    def precision(self) -> Precision:
        """What the convolutions compute in: a CPU knows no TF32."""
        return "float32" if self.device == "cpu" and self.model.precision == "tf32" else self.model.precision


@dataclass(frozen=True, slots=True, kw_only=True)
class RingRates:
    """Requests without payload, each with its answer, between two processes that do nothing else."""

    one_at_a_time_per_s: float  # the next is sent when the answer has come; both sides sleep meanwhile
    many_at_once_per_s: float
    in_flight: int  # of the latter


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """The smallest limit: no server is faster, whatever it does."""

    name: str
    samples_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """The limits of one batch size, measured, and as samples/s."""

    measured: Limits
    samples_per_s: dict[str, float]  # by name; "host memory" binds only a client that copies its payload
    binding: Binding  # for a client that copies its payload into the ring
    binding_in_place: Binding  # for one that makes its payload there

    @classmethod
    def of(cls, measured: Limits, ring: RingRates) -> BatchLimits:
        """Compute the limits of requests of one batch each, whose messages need the ring, too."""
        messages = {RING: ring.many_at_once_per_s * measured.bucket}
        copying = measured.samples_per_s(client_copies=True) | messages
        in_place = measured.samples_per_s(client_copies=False) | messages
        return cls(
            measured=measured,
            samples_per_s=copying,
            binding=smallest(copying),
            binding_in_place=smallest(in_place),
        )


def smallest(limits: dict[str, float]) -> Binding:
    """Return the limit that binds; of equal ones the first. There is at least one."""
    name = min(limits, key=limits.__getitem__)
    return Binding(name=name, samples_per_s=limits[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsReport:
    schema_version: int
    started_at: str  # UTC, ISO 8601
    took_s: float
    command: tuple[str, ...]  # as typed, to run it again
    config: LimitsConfig
    form: str  # how the model ran: "CUDA graphs", "eager", ...
    memcpy_buffer_bytes: int  # size of what was copied within the host's memory
    ring: RingRates
    batches: tuple[BatchLimits, ...]  # by batch size, at least one
    environment: Environment
    torch: TorchFacts
    notes: tuple[str, ...]  # what a reader must know: random weights, what could not be had

    @property
    def title(self) -> str:
        """Say what was measured: model, precision, device."""
        model = self.config.model
        compiled = "compiled" if model.compile else "not compiled"
        where = self.environment.device_name(self.config.device)
        return f"{model.name}, {self.config.precision}, {compiled}, {where}"
