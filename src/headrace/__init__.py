"""Serve ordinary PyTorch models from Python at the speed of the GPU, and prove it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.client import AsyncClient, Client
    from headrace.engine import DynamicDim, Engine, EngineConfig, EngineReport, Normalise

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "DynamicDim", "Engine", "EngineConfig", "EngineReport", "Normalise"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import only what is asked for: commands start fast, and only the engine needs torch."""
    if name in __all__:
        module = "headrace.client" if name in ("AsyncClient", "Client") else "headrace.engine"
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")
