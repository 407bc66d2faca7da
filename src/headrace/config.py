"""What a run is: frozen sections, one per part of the system, refused early.

A part gets its own section and never the whole. `RunConfig` is what the command line builds and what every result
records, so two runs can be told apart by their options alone.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from headrace.errors import InvalidOption

DesignName = Literal["original", "executor", "h2d_d2h_threads", "lanes"]
Precision = Literal["tf32", "float32", "bf16", "fp16", "int8", "fp8"]
Stem = Literal["auto", "keep", "pad", "space-to-depth"]
InputKind = Literal["photos", "random"]
WireType = Literal["float32", "uint8"]
TransportName = Literal["queue", "ring"]
ClientKind = Literal["copy", "zero-copy"]
LoadKind = Literal["burst", "closed", "constant", "poisson", "replay"]
DESIGN_NAMES: tuple[DesignName, ...] = get_args(DesignName)
PUBLISHED_DESIGNS: tuple[DesignName, ...] = ("original", "executor", "h2d_d2h_threads")
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
INPUT_KINDS: tuple[InputKind, ...] = get_args(InputKind)
WIRE_TYPES: tuple[WireType, ...] = get_args(WireType)
TRANSPORTS: tuple[TransportName, ...] = get_args(TransportName)
CLIENTS: tuple[ClientKind, ...] = get_args(ClientKind)
LOADS: tuple[LoadKind, ...] = get_args(LoadKind)
OPEN_LOADS: tuple[LoadKind, ...] = ("constant", "poisson", "replay")  # sent by a schedule, whatever comes back
NULL_OVER_GRPC = "transport=grpc"  # in a null server's URL, see target.law
ENCRYPTED = ("https", "grpcs")  # schemes of a server's URL
MOST_ENGINES = 64  # of one version of a model


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
    # compute in 16 bits, "int8" and "fp8" large linear layers in 8 and the rest in bf16; in the lanes only.
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
    # None and "auto": where it pays, which is in 16 bit on a GPU.
    fuse_epilogues: bool | None = None  # convolution, bias, addition and ReLU in one cuDNN call
    stem: Stem = "auto"  # what becomes of a first convolution of few channels: see model.stem
    pointwise_as_matmul: bool | None = None  # strided convolutions of 1x1: see model.pointwise

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
    """How requests are sent: one alone, some to warm every worker, then the measured ones, by one of these loads.

    burst     all at once, as published
    closed    `concurrency` in flight: the answer to one makes the next one due
    constant  at equal intervals, `rate` requests/s, whatever comes back
    poisson   at independent exponential intervals of mean 1/`rate`, seeded, whatever comes back
    replay    at the moments that the file `arrivals` names, whatever comes back
    """

    kind: LoadKind = "burst"
    num_iters: int = 100  # measured requests, where `duration_s` does not say how long to send
    warmup_iters: int = 1  # requests after the first and before the measured ones
    rate: float | None = None  # requests/s, of all generators together
    concurrency: int | None = None  # requests in flight, of all generators together
    duration_s: float | None = None  # send for so long; how many that makes is up to the load
    arrivals: Path | None = None  # see bench.arrivals
    seed: int = 0  # of the arrivals
    bound_s: float | None = None  # answers later than this after they were due are no goodput
    stall_timeout_s: float = 300.0  # no answer for so long ends the run
    keep_answers: bool = False  # write answers.npy

    def validate(self) -> None:
        require(self.kind in LOADS, f"--load {self.kind}: choose one of {', '.join(LOADS)}")
        require(self.num_iters >= 1, f"--num-iters {self.num_iters}: at least 1 request must be measured")
        require(self.warmup_iters >= 0, f"--warmup-iters {self.warmup_iters}: cannot be negative")
        require(self.stall_timeout_s > 0, f"--stall-timeout {self.stall_timeout_s}: must be above 0 s")
        for name, value in (("--rate", self.rate), ("--duration", self.duration_s), ("--bound", self.bound_s)):
            require(value is None or 0 < value < math.inf, f"{name} {value}: must be above 0, and finite")
        self._require_pair("--rate", self.rate, ("constant", "poisson"))
        self._require_pair("--concurrency", self.concurrency, ("closed",))
        self._require_pair("--arrivals", self.arrivals, ("replay",))
        require(self.concurrency is None or self.concurrency >= 1, f"--concurrency {self.concurrency}: at least 1")
        require(
            self.duration_s is None or self.kind in ("closed", "constant", "poisson"),
            f"--duration {self.duration_s}: load {self.kind} says itself how many requests there are",
        )

    @property
    def words(self) -> str:
        """Say what was sent, in a few words."""
        length = f"{self.num_iters} requests" if self.duration_s is None else f"{self.duration_s:g} s"
        match self.kind:
            case "burst":
                return f"{length} in a burst"
            case "closed":
                return f"{length} with {self.concurrency} in flight"
            case "constant":
                return f"{length} at {self.rate:g} requests/s"
            case "poisson":
                return f"{length} of Poisson arrivals at {self.rate:g} requests/s (seed {self.seed})"
            case "replay":
                return f"arrivals of {self.arrivals and self.arrivals.name}"

    def _require_pair(self, name: str, value: object, kinds: tuple[LoadKind, ...]) -> None:
        """An option and the loads that it belongs to come together or not at all."""
        require(value is not None or self.kind not in kinds, f"--load {self.kind}: needs {name}")
        require(value is None or self.kind in kinds, f"{name} {value}: is for --load {' or '.join(kinds)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessConfig:
    """What a server asks of its clients, by the names of files and a variable: results say these, and no secret."""

    ca_file: Path | None = None  # certificates of who vouches for the server, PEM; None: whom this system trusts
    client_cert: Path | None = None  # chain of certificates that is shown to the server, PEM
    client_key: Path | None = None  # its private key, PEM
    token_file: Path | None = None  # holds a bearer token
    token_env: str | None = None  # name of an environment variable that holds one

    def validate(self, scheme: str) -> None:
        require((self.client_cert is None) == (self.client_key is None), "--client-cert and --client-key: give both")
        require(
            self.token_file is None or self.token_env is None,
            "--token-file and --token-env both hold a token; give one",
        )
        # What is no name of a variable may be the token itself, so it is not repeated.
        require(
            self.token_env is None or re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", self.token_env) is not None,
            "--token-env: must be the name of an environment variable that holds the token, and not the token",
        )
        files = {"--ca-file": self.ca_file, "--client-cert": self.client_cert}
        for name, path in files.items():
            require(
                path is None or scheme in ENCRYPTED,
                f"{name} {path}: is for TLS; give https:// or grpcs:// in --url, or leave it out",
            )
        require(
            scheme != "null" or self == AccessConfig(),
            "--token-file and --token-env: a null server asks for no token; leave them out",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetConfig:
    """A server to measure, in place of a design of ours."""

    url: str  # http://HOST:PORT, grpc://HOST:PORT, https and grpcs for TLS, or null://LAW (see target.law)
    model: str = ""  # its name there
    version: str | None = None  # None: which the server chooses
    generators: int = 1  # processes that send
    label: str = ""  # the run's row in tables; "": made of scheme and model
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of inputs whose shape the server leaves open
    int_range: tuple[int, int] = (0, 99)  # smallest and largest of random whole numbers
    distinct: int = 16  # different payloads, sent in turn
    same_input: bool = False  # send one payload only: beside a run of different ones, that shows a cache
    input_file: Path | None = None  # .npz: an array [distinct, *shape] by input, in place of random numbers
    reference: Path | None = None  # .npz: an array [distinct, *shape] by output, the right answers
    check_model: str | None = None  # file.py:callable whose eager answers are the right ones
    tolerance: float | None = None  # largest relative L2 error of a right row; None: by datatype
    connections: int = 1024  # of all generators together, at most
    request_timeout_s: float = 60.0  # a request that takes longer is unanswered
    access: AccessConfig = field(default_factory=AccessConfig)

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0]

    @property
    def over_grpc(self) -> bool:
        return self.scheme in ("grpc", "grpcs") or (self.scheme == "null" and NULL_OVER_GRPC in self.url)

    @property
    def encrypted(self) -> bool:
        return self.scheme in ENCRYPTED

    def validate(self) -> None:
        schemes = ("http", "https", "grpc", "grpcs", "null")
        host = self.url.partition("://")[2].partition("/")[0]
        require(
            "@" not in host,
            f"--url {self.scheme}://...@{host.rpartition('@')[2]}: holds a name or password, which results would show;"
            " leave it out, and give a token with --token-file or --token-env",
        )
        require(
            self.scheme in schemes and "://" in self.url,
            f"--url {self.url}: must begin with one of {', '.join(f'{name}://' for name in schemes)}",
        )
        self.access.validate(self.scheme)
        require(bool(self.model) or self.scheme == "null", f"--url {self.url}: which model? add --model NAME")
        require(1 <= self.generators <= 64, f"--generators {self.generators}: must be 1 to 64")
        require(1 <= self.distinct <= 65536, f"--distinct {self.distinct}: must be 1 to 65536")
        require(
            self.connections >= self.generators,
            f"--connections {self.connections}: each of the {self.generators} generators needs at least one",
        )
        require(self.request_timeout_s > 0, f"--request-timeout {self.request_timeout_s}: must be above 0 s")
        require(
            self.int_range[0] <= self.int_range[1],
            f"--int-range {self.int_range[0]} {self.int_range[1]}: the smaller comes first",
        )
        require(
            self.reference is None or self.check_model is None,
            "--reference and --check-model both say what is right; give one",
        )
        require(self.tolerance is None or self.tolerance >= 0, f"--tolerance {self.tolerance}: cannot be negative")

    @property
    def experiment(self) -> str:
        """The name of this run's row in tables."""
        return self.label or f"{self.scheme}-{self.model or 'null'}"


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
    gpus: tuple[int, ...] = ()  # an engine on each of them, see `gpus.choose_gpus`; `device` is then the first
    engines_per_device: int = 1
    target: TargetConfig | None = None  # then the sections about the design and its model say nothing
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
        self._validate_engines()
        if self.target is not None:
            self.target.validate()
        require(
            self.transport.name == "queue" or (self.load.concurrency or 0) <= self.transport.ring_slots,
            f"--concurrency {self.load.concurrency}: more than the ring holds, {self.transport.ring_slots}; raise"
            " --ring-slots",
        )

    @property
    def num_engines(self) -> int:
        return max(1, len(self.gpus)) * self.engines_per_device

    def _validate_engines(self) -> None:
        count = self.num_engines
        require(
            self.engines_per_device >= 1 and count <= MOST_ENGINES,
            f"--engines-per-device {self.engines_per_device}: {count} engines; there can be 1 to {MOST_ENGINES}",
        )
        require(
            count == 1 or (self.design.name == "lanes" and self.transport.name == "ring"),
            f"--gpus and --engines-per-device ask for {count} engines: only --design lanes over --transport ring has"
            " more than one",
        )
        require(
            count == 1 or self.load.warmup_iters >= count - 1,
            f"--warmup-iters {self.load.warmup_iters}: each of {count} engines loads its model at its first request;"
            f" send at least {count - 1}",
        )
        require(count == 1 or not self.profile, f"--profile: records one engine, and there are {count}")
        require(count == 1 or not self.limits, f"--limits: measures one engine alone, and there are {count}")

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
        if self.target is not None:
            return self.target.experiment
        suffix = "" if self.transport.name == "queue" else f"-{self.transport.name}"
        if self.transport.client == "zero-copy":
            suffix += "-zero-copy"
        return self.design.experiment + suffix
