"""The words of `headrace deploy`: the model's are those of `headrace serve`, the rest is about the cluster."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from headrace import serve_options
from headrace.config import require
from headrace.deployment import DEFAULT, Deployment
from headrace.model_options import LANES_CPU, LANES_GPU, ModelOptions, is_path, repository, served_model
from headrace.option_fields import check_options, option, options_of
from headrace.serve_config import ServeConfig
from headrace.settings import MODELS, OPTIONS, SERVER

Proxies = Literal["every-node", "head"]
# Of [server]: what Serve's proxies and the replicas have too. Beyond these, a deployment on Ray has none of them.
SHARED = ("host", "http_port", "grpc", "grpc_port", "queue_rows", "max_body_bytes", "drain_timeout_s")
PROTECTION = ("token_file", "tls_cert", "tls_key", "tls_client_ca")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    """Where, and how many."""

    ray_address: str = option(
        "auto",
        "HOST:PORT of the cluster, ray://HOST:PORT, auto for the one that runs on this machine (or RAY_ADDRESS), or"
        " local for one of its own, which ends with the command",
        metavar="ADDRESS",
    )
    replicas: str = option("auto", "a number, or auto: as the requests that wait demand", metavar="N")
    min_replicas: int = option(1, "with --replicas auto", limits=(1, math.inf))
    max_replicas: int | None = option(
        None, "with --replicas auto", limits=(1, math.inf), computed="as many as the cluster has room for"
    )
    target_ongoing_requests: float | None = option(
        None,
        "requests of a replica, on average, that are aimed at with --replicas auto",
        metavar="N",
        limits=(0.01, math.inf),
        computed="three quarters of what its batches hold",
    )
    cpus_per_replica: float = option(1.0, "that are taken from the cluster's", limits=(0, math.inf), metavar="N")
    gpus_per_replica: float | None = option(
        None, "below 1, replicas share a GPU", limits=(0.01, 64), metavar="N", computed="1; 0 with --device cpu"
    )
    app_name: str | None = option(None, "of the Serve application", metavar="NAME", computed="the model's name")
    route_prefix: str = option("/", "where the application's paths begin", metavar="PATH")
    working_dir: Path | None = option(
        None,
        "folder that is sent to the nodes, for a model file that is not on them; the file must lie in it",
        metavar="DIR",
        computed="the file is at the same place on every node",
    )
    proxies: Proxies = option("every-node", "nodes that listen: every one with a replica, or the head")
    surge_percent: int = option(
        25, "more replicas during an update, at least 1; 0: old ones go first", limits=(0, 100), metavar="PERCENT"
    )
    connect_timeout_s: float = option(
        20.0, "for the cluster to answer", key="connect_timeout", limits=(0.1, 3600), metavar="S"
    )
    ready_timeout_s: float = option(
        300.0, "for all replicas to be ready", key="ready_timeout", limits=(1, 86400), metavar="S"
    )

    @property
    def fixed(self) -> int | None:
        """The number of replicas; None where they are scaled."""
        return None if self.replicas == "auto" else int(self.replicas)

    def validate(self) -> None:
        """Raise InvalidOption for what cannot be."""
        check_options(self)
        require(
            self.replicas == "auto" or (self.replicas.isdecimal() and int(self.replicas) >= 1),
            f"--replicas {self.replicas}: must be auto, or a whole number, at least 1",
        )
        require(
            self.max_replicas is None or self.max_replicas >= self.min_replicas,
            f"--max-replicas {self.max_replicas}: must be at least --min-replicas, {self.min_replicas}",
        )
        require(
            self.fixed is None or (self.max_replicas is None and self.min_replicas == 1),
            f"--replicas {self.replicas}: --min-replicas and --max-replicas are for --replicas auto; leave them out",
        )
        require(
            self.route_prefix.startswith("/") and (self.route_prefix == "/" or not self.route_prefix.endswith("/")),
            f"--route-prefix {self.route_prefix}: must begin with /, and not end with it",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RayDeployment:
    """One model, and how it is put on a cluster. `model` is as it was given; what is open, the replicas find out."""

    model: ModelOptions
    server: ServeConfig  # host, ports and limits
    ray: RayOptions
    name: str  # by which clients ask for the model
    notes: tuple[str, ...]

    @property
    def app_name(self) -> str:
        return self.ray.app_name or self.name

    def lanes(self, gpus: float) -> int:
        """Return how many lanes a replica has."""
        return self.model.num_workers or (LANES_GPU if gpus else LANES_CPU)


_RAY = options_of(RayOptions)


def add_ray_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = serve_options.EPILOG + " The options of the cluster are flags only."
    server = [each for each in OPTIONS[SERVER] if each.field in SHARED]
    serve_options.add_options(parser, (*server, *OPTIONS[MODELS]))
    group = parser.add_argument_group("cluster")
    for each in _RAY:
        text = f"{each.text} (default: {each.default_words})".replace("%", "%%")
        group.add_argument(each.flag, dest=each.field, metavar=each.metavar, help=text)


def ray_deployment(args: argparse.Namespace) -> RayDeployment:
    """Return what options, environment and file describe. Raises InvalidOption."""
    words: dict[str, Any] = {
        each.field: each.read_text(given, f"{each.flag} {given}")
        for each in _RAY
        if (given := getattr(args, each.field)) is not None
    }
    ray = RayOptions(**words)
    ray.validate()
    given = serve_options.deployment(args)
    require(
        len(given.models) == 1,
        f"{len(given.models)} models: an application on Ray has one; deploy each by itself, with a --route-prefix",
    )
    model = ModelOptions(**given.models[0].values())
    notes = (*given.notes, *_unused(given))
    server = _server(given)
    _require_device(model, ray)
    described = replace(model, device="cpu").completed()  # what is wrong anywhere; a device is the replicas' to find
    require(repository(described) is None, f"{model.source}: is a folder of models; on Ray, deploy one model at a time")
    served = served_model(described)
    model = _placed(model, ray.working_dir)
    return RayDeployment(model=model, server=server, ray=ray, name=served.name, notes=notes)


def _server(given: Deployment) -> ServeConfig:
    config = ServeConfig(**{field: given.server.settings[field].value for field in SHARED})
    check_options(config)
    for flag, port in (("--http-port", config.http_port), ("--grpc-port", config.grpc_port)):
        require(port > 0, f"{flag} 0: on Ray, give a port above 0; every node's proxy listens on it")
    return config


def _require_device(model: ModelOptions, ray: RayOptions) -> None:
    require(
        model.device in ("auto", "cpu", "cuda"),
        f"--device {model.device}: on Ray, give auto, cpu or cuda; Ray chooses the GPU",
    )
    require(
        model.device != "cpu" or ray.gpus_per_replica is None,
        f"--gpus-per-replica {ray.gpus_per_replica or 0:g}: --device cpu uses none; leave one of the two out",
    )


def _unused(given: Deployment) -> list[str]:
    """Return notes of what Serve's proxies do not do; refuse what would leave the server open. Raises InvalidOption."""
    named = {field: each.named for field, each in given.server.settings.items() if each.origin != DEFAULT}
    for field in PROTECTION:
        require(
            field not in named,
            f"{named.get(field)}: Serve's proxies check no tokens and do not encrypt; put a gateway in front that does",
        )
    return [f"{name} has no effect on Ray" for field, name in named.items() if field not in SHARED]


def _placed(model: ModelOptions, working_dir: Path | None) -> ModelOptions:
    """Return the model with its file as replicas find it. Raises InvalidOption."""
    place, colon, attribute = model.source.rpartition(":")
    if working_dir is None or not is_path(model.source):
        return model
    path, folder = Path(place if colon else model.source).resolve(), working_dir.resolve()
    require(folder.is_dir(), f"--working-dir {working_dir}: there is no such folder")
    require(path.is_relative_to(folder), f"--working-dir {working_dir}: {path.name} does not lie in it")
    source = f"./{path.relative_to(folder)}{colon}{attribute if colon else ''}"
    return replace(model, source=source)
