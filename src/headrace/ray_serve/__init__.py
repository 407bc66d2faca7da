"""Headrace on Ray Serve: replicas that hold an engine each, on the nodes of a cluster. Needs the extra `ray`.

`HeadraceDeployment` is a deployment for graphs of one's own; `headrace deploy` makes a whole application.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.ray_serve.deployment import HeadraceDeployment, deployment_options

__all__ = ["HeadraceDeployment", "deployment_options"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import Ray only when it is asked for: Serve's proxies import this package for `grpc_services` alone."""
    if name in __all__:
        from headrace.ray_serve import deployment  # noqa: PLC0415

        return getattr(deployment, name)
    raise AttributeError(f"module 'headrace.ray_serve' has no attribute {name!r}")
