"""Serve deployments of a replica: for graphs of one's own, and as an application with HTTP and gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace.errors import MissingExtra
from headrace.model_options import LANES_CPU, LANES_GPU, MAX_BATCH_SIZE
from headrace.ray_serve.scaling import load_of

try:
    from ray import serve
except ImportError as error:
    raise MissingExtra(f"Ray is not installed ({error}); pip install 'headrace[ray]'") from error

from headrace.ray_serve.replica import HttpReplica, Replica

if TYPE_CHECKING:
    from ray.serve import Deployment

STARTS = 2  # of a replica that fails; the second is for what a node does, not for the model
SURGE_PERCENT = 25
HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 30.0
DRAIN_TIMEOUT_S = 30.0
SECONDS_TO_SCALE_UP = 5.0
SECONDS_TO_SCALE_DOWN = 120.0


def deployment_options(
    *, gpus: float = 0, cpus: float = 1, max_batch_size: int = MAX_BATCH_SIZE, lanes: int | None = None
) -> dict[str, Any]:
    """Return options of a deployment whose replicas have such an engine: what Serve may give them, and their needs.

    An update starts new replicas first, takes an old one away for each that is warm, and stops where they fail.
    """
    load = load_of(max_batch_size, lanes or (LANES_GPU if gpus else LANES_CPU))
    return {
        "max_ongoing_requests": load.most,
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus},
        "max_surge_percent": SURGE_PERCENT,
        "max_constructor_retry_count": STARTS,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": DRAIN_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "logging_config": {"enable_access_log": False},
    }


def http_deployment(name: str) -> Deployment:
    """Return a deployment that answers HTTP and gRPC, to be the ingress of an application."""
    return _deployment(serve.ingress()(HttpReplica), name)


def _deployment(replica: type, name: str) -> Deployment:
    made: Deployment = serve.deployment(name=name, **deployment_options())(replica)
    return made


HeadraceDeployment = _deployment(Replica, "Headrace")
