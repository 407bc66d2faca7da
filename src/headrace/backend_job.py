"""What a backend's process is given. No torch: the supervisor makes it."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection

from headrace.config import LanesConfig, ModelConfig
from headrace.transport.pair import DupFdHolder


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendJob:
    """What to serve, and how."""

    name: str  # by which clients ask for it
    version: str
    model: ModelConfig
    device: str
    num_lanes: int
    lanes: LanesConfig
    image_size: int  # of torchvision's models
    wake: DupFdHolder  # the eventfd that wakes the backend, shared by all rings
    control: Connection
