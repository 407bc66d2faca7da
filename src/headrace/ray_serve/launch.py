"""`headrace deploy`: reach the cluster, see what fits, have Serve run the application, and tell how it ended."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from headrace import errors
from headrace.clock import NS_PER_S, now_ns
from headrace.config import require
from headrace.errors import (
    DeviceUnavailable,
    HeadraceError,
    InvalidOption,
    MissingExtra,
    ModelError,
    RunFailed,
    Unreachable,
)
from headrace.model_options import MAX_BATCH_SIZE, ModelOptions
from headrace.option_fields import options_of
from headrace.ray_serve import scaling

try:
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException
    from ray.serve.schema import ReplicaState  # type: ignore[attr-defined]
except ImportError as error:
    raise MissingExtra(f"Ray is not installed ({error}); pip install 'headrace[ray]'") from error

from headrace.ray_serve.application import application
from headrace.ray_serve.deployment import SECONDS_TO_SCALE_DOWN, SECONDS_TO_SCALE_UP

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

    from headrace.ray_options import RayDeployment

Tell = Callable[[str], None]
SERVICES = "headrace.ray_serve.grpc_services:add_to_server"
POLL_S = 0.2
LOCATIONS = {"every-node": "EveryNode", "head": "HeadOnly"}
_ADDRESS = re.compile(r"(?:ray://)?(?P<place>(?:[^:/]+|\[[^\]]+\]):\d+)")
_TOLD = re.compile(r"headrace\.errors\.(?P<kind>\w+): (?P<text>[^\n]+)")
_LAST_LINE = re.compile(r"^(\w[\w.]*(?:Error|Exception|Exit)\b[^\n]*)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many replicas, of what, as decided before anything is started."""

    least: int
    most: int  # the same, where they are not scaled
    gpus: float  # of a replica
    cpus: float
    notes: tuple[str, ...]


def deploy(given: RayDeployment, tell: Tell) -> None:
    """Run the model's application, and return when its replicas are ready; with a cluster of its own, never.

    Raises Unreachable, InvalidOption for more than the cluster has room for, DeviceUnavailable, what the model fails
    with, and RunFailed when it is not ready in time. What ran under the name before goes on serving then.
    """
    connect(given.ray.ray_address, given.ray.connect_timeout_s, given.ray.working_dir)
    try:
        plan = planned(given, _nodes())
        for note in (*given.notes, *plan.notes, *_started(given)):
            tell(note)
        known = serve.status().applications.get(given.app_name)
        _run(given, plan)
        _wait(given, _now_serves(known))
        count = _replicas(given)
        tell(f"ready: {given.name}, {count} replica{'s' * (count != 1)}; {_addresses(given)}")
        if given.ray.ray_address == "local":
            threading.Event().wait()
    finally:
        ray.shutdown()


def connect(address: str, timeout_s: float, working_dir: Path | None = None) -> None:
    """Become a driver of the cluster, which gets `working_dir`. Raises Unreachable within the time."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = _ADDRESS.fullmatch(address)
    require(
        found is not None or address in ("auto", "local"),
        f"--ray-address {address}: must be HOST:PORT, ray://HOST:PORT, auto or local",
    )
    if found is not None:
        _knock(address, found["place"], timeout_s)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            configure_logging=False,
            include_dashboard=False if address == "local" else None,  # of a cluster that runs, it is not ours to say
            runtime_env=None if working_dir is None else {"working_dir": str(working_dir.resolve())},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:  # none runs here; of another version; a large folder
        raise Unreachable(
            f"--ray-address {address}: {_first_line(error)}; start a cluster with `ray start --head`, name one, or use"
            " --ray-address local; for one at an address that asks for a token, set RAY_AUTH_MODE=token"
        ) from error


def planned(given: RayDeployment, nodes: Sequence[Mapping[str, float]]) -> Plan:
    """Return what is to run on nodes of these resources. Raises InvalidOption and DeviceUnavailable."""
    gpus = _gpus(given, nodes)
    needs = {"CPU": given.ray.cpus_per_replica, "GPU": gpus}
    fits = scaling.room(nodes, needs)
    fixed = given.ray.fixed
    least = fixed or given.ray.min_replicas
    flag = "--replicas" if fixed else "--min-replicas"
    have = ", ".join(scaling.words({name: node.get(name, 0) for name in needs}) for node in nodes)
    require(
        least <= fits,
        f"{flag} {least}: each replica takes {scaling.words(needs)}, and the cluster has room for {fits}"
        f" (nodes: {have}); ask for less, or add nodes",
    )
    most = fixed or given.ray.max_replicas or fits
    notes: tuple[str, ...] = ()
    if most > fits:
        notes = (f"--max-replicas {most}: the cluster has room for {fits} now; more need more nodes",)
    return Plan(least=least, most=most, gpus=gpus, cpus=given.ray.cpus_per_replica, notes=notes)


def _nodes() -> list[Mapping[str, float]]:
    told: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in told if node["Alive"]]


def _gpus(given: RayDeployment, nodes: Sequence[Mapping[str, float]]) -> float:
    device, asked = given.model.device, given.ray.gpus_per_replica
    if device == "cpu":
        return 0.0
    there = any(node.get("GPU", 0) > 0 for node in nodes)
    if not there and (device == "cuda" or asked is not None):
        wanted = f"--device {device}" if device == "cuda" else f"--gpus-per-replica {asked:g}"
        raise DeviceUnavailable(
            f"{wanted}: none of the cluster's {len(nodes)} nodes has a GPU; use --device cpu, or add a node with one"
        )
    return (asked or 1.0) if there else 0.0


def _started(given: RayDeployment) -> list[str]:
    """Start Serve where it does not run; return what a caller may not expect of it."""
    server = given.server
    running = _client()
    if running is None:
        try:
            serve.start(
                proxy_location=LOCATIONS[given.ray.proxies],
                http_options={"host": server.host, "port": server.http_port},
                grpc_options={
                    "port": server.grpc_port,
                    "grpc_servicer_functions": [SERVICES],
                    "enable_reflection": False,
                }
                if server.grpc
                else None,
                logging_config={"enable_access_log": False},
            )
        except ImportError as error:
            raise RunFailed(f"Serve cannot import {SERVICES} on the cluster; install headrace on every node") from error
        open_grpc = server.grpc and server.host in ("127.0.0.1", "localhost", "::1")
        return [
            "Serve's gRPC proxies listen on all addresses, whatever --host says; --no-grpc leaves them out"
        ] * open_grpc
    notes = []
    if running.http_config.port != server.http_port:
        notes.append(f"Serve runs already and listens on port {running.http_config.port}; --http-port has no effect")
    if server.grpc and SERVICES not in _grpc_config(running).grpc_servicer_functions:
        notes.append(f"Serve runs already and does not offer gRPC; start it with grpc_servicer_functions {SERVICES}")
    return notes


def _run(given: RayDeployment, plan: Plan) -> None:
    ray_options = given.ray
    words = {each.field: getattr(given.model, each.field) for each in options_of(ModelOptions)}
    args = words | {
        "device": "cuda" if plan.gpus else "cpu",
        "name": given.name,
        "gpus": plan.gpus,
        "cpus": plan.cpus,
        "max_body_bytes": given.server.max_body_bytes,
    }
    changes: dict[str, Any] = {
        "max_surge_percent": ray_options.surge_percent,
        "graceful_shutdown_timeout_s": given.server.drain_timeout_s,
    }
    if given.server.queue_rows is not None:
        changes["max_queued_requests"] = given.server.queue_rows
    if ray_options.fixed is None:
        batch = given.model.max_batch_size or max(given.model.buckets or (MAX_BATCH_SIZE,))
        load = scaling.load_of(batch, given.lanes(plan.gpus))
        changes["autoscaling_config"] = {
            "min_replicas": plan.least,
            "initial_replicas": plan.least,
            "max_replicas": plan.most,
            "target_ongoing_requests": ray_options.target_ongoing_requests or load.target,
            "upscale_delay_s": SECONDS_TO_SCALE_UP,
            "downscale_delay_s": SECONDS_TO_SCALE_DOWN,
        }
    else:
        changes["num_replicas"] = plan.most
    target = serve.RunTarget(
        target=application(args, changes), name=given.app_name, route_prefix=ray_options.route_prefix
    )
    try:
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except RayServeException as error:  # as for a prefix that another application has
        reason = _first_line(getattr(error, "cause", None) or error)
        raise InvalidOption(f"--route-prefix {ray_options.route_prefix}: {reason}") from error


def _wait(given: RayDeployment, serves: bool) -> None:
    """Return when the application is ready. Raises what it failed with, or RunFailed when the time is over."""
    until_ns = now_ns() + int(given.ray.ready_timeout_s * NS_PER_S)
    while True:
        told = serve.status().applications.get(given.app_name)
        if told is not None and told.status == "DEPLOY_FAILED":
            raise _failure(given, told, serves)
        if told is not None and told.status == "RUNNING":
            return
        if now_ns() > until_ns:
            before = "; the version before goes on serving" if serves else ""
            raise RunFailed(
                f"{given.app_name} is not ready after {given.ray.ready_timeout_s:g} s, and Ray goes on trying"
                f" ({_messages(told) if told else 'not known yet'}){before}; raise --ready-timeout to wait longer"
            )
        time.sleep(POLL_S)


def _failure(given: RayDeployment, told: ApplicationStatusOverview, serves: bool) -> HeadraceError:
    """Return what a deployment failed with, the model's own error if it is one, and take away what never served."""
    text = _messages(told)
    if not serves:
        with suppress(Exception):
            serve.delete(given.app_name)
    before = "; the version before goes on serving" if serves else ""
    found = list(_TOLD.finditer(text))
    if found:
        kind: type[HeadraceError] = getattr(errors, found[-1]["kind"], ModelError)
        return kind(f"{found[-1]['text']}{before}")
    lines = _LAST_LINE.findall(text)
    return RunFailed(f"{given.app_name} could not be deployed: {lines[-1] if lines else text}{before}")


def _messages(told: ApplicationStatusOverview) -> str:
    return "\n".join(filter(None, (told.message, *(each.message for each in told.deployments.values()))))


def _now_serves(told: ApplicationStatusOverview | None) -> bool:
    return told is not None and any(each.replica_states.get(ReplicaState.RUNNING) for each in told.deployments.values())


def _replicas(given: RayDeployment) -> int:
    deployments = serve.status().applications[given.app_name].deployments.values()
    return sum(each.replica_states.get(ReplicaState.RUNNING, 0) for each in deployments)


def _addresses(given: RayDeployment) -> str:
    client = _client()
    http, grpc = client.http_config, _grpc_config(client)
    prefix = given.ray.route_prefix.rstrip("/")
    text = f"HTTP on http://{http.host or '127.0.0.1'}:{http.port}{prefix}/v2/models/{given.name}"
    if SERVICES not in grpc.grpc_servicer_functions:
        return text
    return f"{text}, gRPC on port {grpc.port}" + f" with the metadata application: {given.app_name}" * (prefix != "")


def _client() -> Any:  # noqa: ANN401  Serve has no public way to its own ports
    from ray.serve.context import _get_global_client  # noqa: PLC0415

    return _get_global_client(raise_if_no_controller_running=False)


def _grpc_config(client: Any) -> Any:  # noqa: ANN401
    return ray.get(client._controller.get_grpc_config.remote())  # noqa: SLF001


def _knock(address: str, place: str, timeout_s: float) -> None:
    """See whether something speaks gRPC there, as all of Ray's servers do; Ray waits long. Raises Unreachable."""
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except OSError as error:
        raise Unreachable(
            f"--ray-address {address}: nothing answers there ({error}); check the address and that the cluster runs"
        ) from error
    if os.environ.get("RAY_USE_TLS", "0") != "0":  # its handshake needs certificates, which are Ray's to read
        return
    with grpc.insecure_channel(place) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout_s)
        except grpc.FutureTimeoutError as error:
            raise Unreachable(
                f"--ray-address {address}: the cluster did not answer within {timeout_s:g} s; check the address, or"
                " raise --connect-timeout"
            ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
