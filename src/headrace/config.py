"""What a run is: frozen sections, one per part of the system, refused early.

A part gets its own section and never the whole. `RunConfig` is what the command line builds and what every result
records, so two runs can be told apart by their options alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from headrace.errors import InvalidOption

DesignName = Literal["original", "executor", "h2d_d2h_threads", "lanes"]
Precision = Literal["tf32", "float32", "bf16", "fp16"]
InputKind = Literal["photos", "random"]
WireType = Literal["float32", "uint8"]
TransportName = Literal["queue", "ring"]
ClientKind = Literal["copy", "zero-copy"]
DESIGN_NAMES: tuple[DesignName, ...] = get_args(DesignName)
PUBLISHED_DESIGNS: tuple[DesignName, ...] = ("original", "executor", "h2d_d2h_threads")
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
INPUT_KINDS: tuple[InputKind, ...] = get_args(InputKind)
WIRE_TYPES: tuple[WireType, ...] = get_args(WireType)
TRANSPORTS: tuple[TransportName, ...] = get_args(TransportName)
CLIENTS: tuple[ClientKind, ...] = get_args(ClientKind)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidOption(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, from where, and how it computes."""

    name: str = "resnet18"  # torchvision name, "efficientnet_lite0", package.module:callable, or file.py:callable
    model_dir: Path = Path()  # where checkpoints lie
    download: bool = True  # fetch a missing torchvision checkpoint; else seeded random weights
    seed: int = 0  # of the random weights
    compile: bool = False  # torch.compile, as published
    compile_cache: Path | None = None  # folder where compiled code is kept for the next run; None: PyTorch's own
    # Of float32 tensors: "tf32" lets convolutions round (PyTorch's default), "float32" forbids it. "bf16" and "fp16"
    # compute in 16 bits, in the lanes only.
    precision: Precision = "tf32"


@dataclass(frozen=True, slots=True, kw_only=True)
class DesignConfig:
    """How the backend moves a batch."""

    name: DesignName = "h2d_d2h_threads"
    num_workers: int = 1  # predict threads, or lanes; the first two designs have one by definition

    @property
    def experiment(self) -> str:
        """The name of this design's row in the published tables."""
        if self.name == "lanes":
            return f"{self.num_workers}_lanes"
        return f"{self.num_workers}_predict_workers" if self.num_workers > 1 else self.name

    def validate(self, *, compiled: bool, precision: Precision = "tf32") -> None:
        require(
            self.name in DESIGN_NAMES,
            f"--design {self.name}: there is no such design; choose one of {', '.join(DESIGN_NAMES)}",
        )
        require(self.num_workers >= 1, f"--num-workers {self.num_workers}: at least 1 worker must predict")
        require(
            self.num_workers == 1 or self.name in ("h2d_d2h_threads", "lanes"),
            f"--num-workers {self.num_workers}: design {self.name} has one predict thread by definition;"
            " use --design lanes or h2d_d2h_threads for several",
        )
        require(
            not (compiled and self.num_workers > 1) or self.name == "lanes",
            f"--compile with --num-workers {self.num_workers}: torch.compile is not thread-safe and this design's"
            " workers would compile at the same time; use --num-workers 1, --no-compile, or --design lanes",
        )
        require(
            precision in ("tf32", "float32") or self.name == "lanes",
            f"--precision {precision}: the published designs compute float32 tensors; use --design lanes, or tf32",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LanesConfig:
    """How the lanes run batches; their number is the design's `num_workers`."""

    buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # rows that the model is prepared for, ascending
    max_queue_delay_us: int = 0  # how long a batch may wait to grow; 0: never while a lane is free
    depth: int = 3  # batches that a lane has at once, running and queued behind
    graphs: bool = True  # CUDA graphs, where the model can be captured
    prefetch: bool = True  # large batches are copied in on a stream of their own, ahead of the lanes
    spin: bool = True  # wait for the device with a busy core, which answers sooner than an interrupt
    channels_last: bool = True
    fold_batch_norm: bool = True
    fuse_epilogues: bool = False  # convolution, bias, addition and ReLU in one cuDNN call
    space_to_depth: bool = False  # rewrite a strided first convolution of few channels exactly, as a dense one of many

    def validate(self) -> None:
        require(
            bool(self.buckets) and min(self.buckets) >= 1 and list(self.buckets) == sorted(set(self.buckets)),
            f"--buckets {' '.join(map(str, self.buckets))}: give ascending numbers of rows, each once and at least 1",
        )
        require(self.max_queue_delay_us >= 0, f"--max-queue-delay-us {self.max_queue_delay_us}: cannot be negative")
        require(1 <= self.depth <= 64, f"--lane-depth {self.depth}: must be 1 to 64")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputConfig:
    """What the requests carry: images, made before the clock starts.

    Over the wire they are float32 [batch_size, 3, image_size, image_size], normalised, or uint8 [batch_size,
    image_size, image_size, 3], which the lanes normalise on the device.
    """

    kind: InputKind = "photos"
    wire: WireType = "float32"
    files: tuple[Path, ...] = ()  # own image files, one row each, in order, in place of `kind`
    batch_size: int = 32  # rows of one request
    image_size: int = 250  # pixels, height and width
    distinct_images: int = 256  # rows to draw from; every row of a batch is another one
    memory_limit_bytes: int = 1 << 30  # of prepared batches; beyond it they repeat in turn
    seed: int = 0

    def distinct_rows(self, num_batches: int) -> int:
        """Return how many different rows `num_batches` requests draw from."""
        if self.files:
            return len(self.files)
        return max(self.batch_size, min(self.distinct_images, num_batches * self.batch_size))

    def validate(self) -> None:
        require(self.batch_size >= 1, f"--batch-size {self.batch_size}: a request has at least 1 row")
        require(
            32 <= self.image_size <= 4096,
            f"--image-size {self.image_size}: must be 32 to 4096 pixels",
        )
        require(self.distinct_images >= 1, f"--distinct-images {self.distinct_images}: at least 1 is needed")
        require(self.wire in WIRE_TYPES, f"--wire {self.wire}: choose one of {', '.join(WIRE_TYPES)}")
        require(self.kind in INPUT_KINDS, f"--input {self.kind}: choose one of {', '.join(INPUT_KINDS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """How requests are sent: one alone, some to warm every worker, then all at once (the published burst)."""

    num_iters: int = 100  # measured requests
    warmup_iters: int = 1  # requests after the first and before the measured ones
    stall_timeout_s: float = 300.0  # no answer for so long ends the run
    keep_answers: bool = False  # write answers.npy

    def validate(self) -> None:
        require(self.num_iters >= 1, f"--num-iters {self.num_iters}: at least 1 request must be measured")
        require(self.warmup_iters >= 0, f"--warmup-iters {self.warmup_iters}: cannot be negative")
        require(self.stall_timeout_s > 0, f"--stall-timeout {self.stall_timeout_s}: must be above 0 s")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportConfig:
    """How a batch crosses from the client's process to the backend's."""

    name: TransportName = "queue"  # "queue" is the published one
    ring_slots: int = 16  # requests that a ring holds at once
    client: ClientKind = "copy"  # "zero-copy": the client's data lie in the ring already, as if made there

    def validate(self) -> None:
        require(self.client in CLIENTS, f"--client {self.client}: choose one of {', '.join(CLIENTS)}")
        require(
            self.client == "copy" or self.name == "ring",
            f"--client {self.client}: only a ring has memory to write into; add --transport ring",
        )
        require(self.name in TRANSPORTS, f"--transport {self.name}: choose one of {', '.join(TRANSPORTS)}")
        require(1 <= self.ring_slots <= 65536, f"--ring-slots {self.ring_slots}: must be 1 to 65536")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run of one design under one load."""

    device: str = "cpu"  # "cpu", "cuda" or "cuda:N"; the command line resolves "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    design: DesignConfig = field(default_factory=DesignConfig)
    inputs: InputConfig = field(default_factory=InputConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    lanes: LanesConfig = field(default_factory=LanesConfig)
    limits: bool = False  # measure after serving what no server could exceed, and compare; lanes only
    telemetry_interval_s: float = 0.1
    profile: bool = False  # write trace.json; disturbs the timings

    def validate(self) -> None:
        self.design.validate(compiled=self.model.compile, precision=self.model.precision)
        self.inputs.validate()
        self.lanes.validate()
        if self.design.name == "lanes":
            largest = self.lanes.buckets[-1]
            require(
                self.inputs.batch_size <= largest,
                f"--batch-size {self.inputs.batch_size}: more rows than the largest bucket, {largest}; raise"
                " --max-batch-size or --buckets",
            )
        require(
            self.inputs.wire == "float32" or (self.design.name == "lanes" and self.transport.name == "ring"),
            f"--wire {self.inputs.wire}: the published designs and their queue carry float32; use --design lanes",
        )
        self.load.validate()
        self.transport.validate()

    @property
    def row_features(self) -> tuple[int, ...]:
        """The shape of one row as requests carry it."""
        side = self.inputs.image_size
        return (3, side, side) if self.inputs.wire == "float32" else (side, side, 3)

    @property
    def device_kind(self) -> str:
        """The device without its number: "cpu" or "cuda"."""
        return self.device.partition(":")[0]

    @property
    def gpu_index(self) -> int | None:
        """The CUDA index; None on the CPU."""
        return int(self.device.partition(":")[2] or 0) if self.device_kind == "cuda" else None

    @property
    def precision(self) -> Precision:
        """What the convolutions compute in: a CPU knows no TF32."""
        return "float32" if self.device_kind == "cpu" and self.model.precision == "tf32" else self.model.precision

    @property
    def experiment(self) -> str:
        """The name of this run's row in tables: the published one, with the transport where it is not."""
        suffix = "" if self.transport.name == "queue" else f"-{self.transport.name}"
        if self.transport.client == "zero-copy":
            suffix += "-zero-copy"
        return self.design.experiment + suffix


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """A server of one model."""

    name: str  # by which clients ask for it
    version: str = "1"
    model: ModelConfig = field(default_factory=ModelConfig)
    device: str = "cpu"
    num_lanes: int = 1
    lanes: LanesConfig = field(default_factory=LanesConfig)
    image_size: int = 224  # of torchvision's models
    host: str = "127.0.0.1"
    http_port: int = 8000  # 0: any that is free
    frontends: int = 1  # processes that share the port
    queue_rows: int = 256  # rows that one frontend holds at once; beyond it requests are refused
    ring_socket: str = "auto"  # where clients on this host get rings: by the HTTP port's name, at a path, or "off"
    ring_bytes: int = 4 << 30  # shared memory of all such clients together
    max_body_bytes: int = 256 << 20
    body_timeout_s: float = 30.0  # for a request's body to come
    drain_timeout_s: float = 30.0  # at the end, for what was taken

    def validate(self) -> None:
        self.lanes.validate()
        require(self.num_lanes >= 1, f"--num-workers {self.num_lanes}: at least 1 lane must compute")
        require(0 <= self.http_port <= 65535, f"--http-port {self.http_port}: must be 0 to 65535")
        require(1 <= self.frontends <= 64, f"--frontends {self.frontends}: must be 1 to 64")
        largest = self.lanes.buckets[-1]
        require(
            self.queue_rows >= largest,
            f"--queue-rows {self.queue_rows}: must hold a largest batch, {largest} rows",
        )
        require(self.ring_bytes >= 1 << 20, f"--ring-bytes {self.ring_bytes}: must be at least 1 MiB")
        require(self.max_body_bytes >= 1024, f"--max-body-bytes {self.max_body_bytes}: must be at least 1024")
        require(self.body_timeout_s > 0, f"--body-timeout {self.body_timeout_s}: must be above 0 s")
        require(self.drain_timeout_s >= 0, f"--drain-timeout {self.drain_timeout_s}: cannot be negative")
