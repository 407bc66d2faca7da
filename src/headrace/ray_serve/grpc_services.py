"""What Serve's gRPC proxies register: the protocol's calls by name, their messages passed on as bytes.

A proxy hands each call to the method of that name on a replica. Without a deserializer it does not parse the message,
so a tensor is not copied by protobuf, and proxies need not know the messages. Source: Ray Serve docs, "Set Up a gRPC
Service"; grpc_servicer_functions are called with a servicer and the server.
"""

from __future__ import annotations

from typing import Any, Protocol

import grpc

SERVICE = "inference.GRPCInferenceService"
CALLS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelConfig",
    "ModelInfer",
)


class _Server(Protocol):
    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None: ...


def add_to_server(servicer: object, server: _Server) -> None:
    """Register the calls with a proxy's server, which puts its own handlers in their place."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name)) for name in CALLS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
