"""What a server is: its models, and what they share; frozen, refused early.

Each `option` is a flag, a variable and a key of a deployment's file.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from headrace.addresses import require_host, require_origin, require_traces_url
from headrace.config import MOST_ENGINES, LanesConfig, ModelConfig, require
from headrace.gpus import ChosenGpu
from headrace.option_fields import check_options, option

ModelControl = Literal["none", "explicit"]
QUEUE_BATCHES = 8  # largest batches that a frontend holds at once
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"
MODEL_VERSION = r"[1-9][0-9]{0,17}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModelConfig:
    """One version of a model that a server has, with backend processes, its engines, of its own."""

    name: str  # by which clients ask for it
    version: str = "1"  # digits
    model: ModelConfig = field(default_factory=ModelConfig)
    device: str = "cpu"  # of the one engine, or of several; where there are `gpus`, these
    gpus: tuple[ChosenGpu, ...] = ()
    engines_per_device: int = 1
    num_lanes: int = 1  # of each engine
    lanes: LanesConfig = field(default_factory=LanesConfig)
    image_size: int = 224  # of torchvision's models
    preprocess_threads: int = 1  # for what a model's description has the host do
    batching_is_open: bool = False  # nobody has said how large batches are: the model's description may

    @property
    def num_engines(self) -> int:
        return max(1, len(self.gpus)) * self.engines_per_device

    @property
    def largest_batch(self) -> int:
        return self.lanes.buckets[-1]

    def validate(self) -> None:
        require(
            re.fullmatch(MODEL_NAME, self.name) is not None,
            f"--name {self.name}: must be letters, digits, '_', '.' and '-', and begin with a letter or digit, as"
            " part of an address",
        )
        require(
            re.fullmatch(MODEL_VERSION, self.version) is not None,
            f"--model-version {self.version}: must be a whole number of 1 to 18 digits, no zeros in front",
        )
        self.lanes.validate()
        require(self.num_lanes >= 1, f"--num-workers {self.num_lanes}: at least 1 lane must compute")
        require(self.preprocess_threads >= 1, f"--preprocess-threads {self.preprocess_threads}: at least 1 is needed")
        require(
            self.engines_per_device >= 1 and self.num_engines <= MOST_ENGINES,
            f"--engines-per-device {self.engines_per_device}: {self.num_engines} engines; there can be 1 to"
            f" {MOST_ENGINES}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryConfig:
    """A folder of models: FOLDER/NAME/VERSION/, looked at anew whenever a model is loaded."""

    folder: Path
    defaults: ServedModelConfig  # of its models, but for their names, versions and sources
    versions: tuple[str, ...] = ("latest",)  # which of a model's versions are served: latest, all, or numbers

    def validate(self) -> None:
        require(self.folder.is_dir(), f"{self.folder}: there is no such folder of models")
        self.defaults.validate()
        known = self.versions in (("latest",), ("all",)) or all(
            re.fullmatch(MODEL_VERSION, version) for version in self.versions
        )
        require(
            bool(self.versions) and known,
            f"--versions {' '.join(self.versions)}: give latest, all, or numbers of versions",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """A server: its models, and what they share. Each `option` is a flag, a variable and a key of `[server]`."""

    models: tuple[ServedModelConfig, ...] = ()
    repository: RepositoryConfig | None = None
    host: str = option("127.0.0.1", "address to listen on; 127.0.0.1 is this machine only", metavar="ADDRESS")
    http_port: int = option(8000, "0 takes any that is free", metavar="PORT", limits=(0, 65535))
    grpc: bool = option(True, "serve gRPC beside HTTP")
    grpc_port: int = option(8001, "0 takes any that is free", metavar="PORT", limits=(0, 65535))
    system_shared_memory: bool = option(
        False,
        "let clients name shared memory of this machine, which the server then reads and writes; only for clients that"
        " may see all that the server's user may",
    )
    frontends: int = option(1, "processes that share the port", limits=(1, 64))
    queue_rows: int | None = option(
        None,
        "rows of a model that a frontend holds at once; beyond it requests are refused",
        limits=(1, math.inf),
        computed="8 largest batches of the model",
    )
    ring_socket: str = option(
        "auto", "where programs of this user on this host get shared memory: auto (no file), a path, or off"
    )
    ring_bytes: int = option(4 << 30, "shared memory of all such programs together", limits=(1 << 20, math.inf))
    max_body_bytes: int = option(256 << 20, "largest body of a request", limits=(1024, math.inf))
    body_timeout_s: float = option(
        30.0, "for a body to come, and for an answer to be taken", key="body_timeout", limits=(0.001, math.inf)
    )
    header_timeout_s: float = option(
        10.0, "for a request's head to come", key="header_timeout", limits=(0.001, math.inf), group="connections"
    )
    idle_timeout_s: float = option(
        75.0, "of a connection between requests", key="idle_timeout", limits=(0.001, math.inf), group="connections"
    )
    max_connections: int = option(1024, "of one frontend", limits=(1, math.inf), group="connections")
    drain_timeout_s: float = option(
        30.0, "at the end, or before a version ends, for what was taken", key="drain_timeout", limits=(0, math.inf)
    )
    token_file: Path | None = option(
        None, "bearer tokens that are let in, one per line", metavar="FILE", computed="all are", group="connections"
    )
    tls_cert: Path | None = option(
        None, "certificate chain, PEM: encrypt connections", metavar="FILE", group="connections"
    )
    tls_key: Path | None = option(None, "its private key, PEM", metavar="FILE", group="connections")
    tls_client_ca: Path | None = option(
        None, "let in only clients with a certificate that this signed, PEM", metavar="FILE", group="connections"
    )
    allow_origin: tuple[str, ...] | None = option(
        None,
        "web pages that are let in, as SCHEME://HOST:PORT; * for all",
        metavar="ORIGIN",
        computed="only the server's own",
        group="connections",
    )
    allow_host: tuple[str, ...] | None = option(
        None,
        "other names by which clients ask for the server; once any is given, the rest is refused on every address",
        metavar="NAME",
        computed="on this machine only, its own; elsewhere any",
        group="connections",
    )
    trace_endpoint: str | None = option(
        None,
        "send traces of requests to a collector that speaks OTLP over HTTP, as http://127.0.0.1:4318",
        metavar="URL",
        computed="nothing is traced",
        group="traces",
    )
    trace_ratio: float = option(
        0.01,
        "of requests whose callers do not say whether to trace them",
        limits=(0, 1),
        metavar="SHARE",
        group="traces",
    )
    model_control: ModelControl = option("none", "explicit: clients may load and unload models")

    @property
    def kinds(self) -> tuple[ServedModelConfig, ...]:
        """Everything that says how models are served: each by name, and those of the folder together."""
        return (*self.models, *(() if self.repository is None else (self.repository.defaults,)))

    @property
    def gpus(self) -> tuple[ChosenGpu, ...]:
        """The GPUs that were chosen with --gpus, each once."""
        return tuple(dict.fromkeys(gpu for each in self.kinds for gpu in each.gpus))

    @property
    def watched_devices(self) -> tuple[str, ...]:
        """All devices that models compute on but the CPU: by UUID where they were chosen, else as torch calls them."""
        found = [gpu.uuid for gpu in self.gpus]
        found += [each.device for each in self.kinds if not each.gpus and each.device != "cpu"]
        return tuple(dict.fromkeys(found))

    def queue_rows_of(self, largest_batch: int) -> int:
        """Return how many rows of a model with such batches a frontend holds at once."""
        return QUEUE_BATCHES * largest_batch if self.queue_rows is None else self.queue_rows

    def validate(self) -> None:
        """Refuse what cannot be served. Raises InvalidOption."""
        check_options(self)
        require(bool(self.models) or self.repository is not None, "there is no model to serve; name at least one")
        if self.repository is not None:
            self.repository.validate()
        named: set[tuple[str, str]] = set()
        for each in self.models:
            each.validate()
            require(
                (each.name, each.version) not in named,
                f"two models are called {each.name}, version {each.version}; give each a name or a version of its own",
            )
            named.add((each.name, each.version))
        for each in self.kinds:
            require(
                self.queue_rows_of(each.largest_batch) >= each.largest_batch,
                f"--queue-rows {self.queue_rows}: must hold a largest batch of {each.name}, {each.largest_batch} rows",
            )
        self._validate_connections()

    def _validate_connections(self) -> None:
        for origin in self.allow_origin or ():
            require_origin(origin)
        for host in self.allow_host or ():
            require_host(host)
        if self.trace_endpoint is not None:
            require_traces_url(self.trace_endpoint)
        require((self.tls_cert is None) == (self.tls_key is None), "--tls-cert and --tls-key: give both or neither")
        require(
            self.tls_client_ca is None or self.tls_cert is not None,
            "--tls-client-ca: only encrypted connections show certificates; add --tls-cert and --tls-key",
        )
