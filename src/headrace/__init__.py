"""Serve ordinary PyTorch models from Python at the speed of the GPU, and prove it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.engine import DynamicDim, Engine, EngineConfig, EngineReport, Normalise

__version__ = "0.1.0"
__all__ = ["DynamicDim", "Engine", "EngineConfig", "EngineReport", "Normalise"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import torch only for those who ask for the engine: commands start fast."""
    if name in __all__:
        return getattr(importlib.import_module("headrace.engine"), name)
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")
