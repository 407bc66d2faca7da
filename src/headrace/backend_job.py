"""What a backend's process is given. No torch: the supervisor makes it."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection

from headrace.placement import Place
from headrace.serve_config import ServedModelConfig
from headrace.transport.pair import DupFdHolder


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendJob:
    """What to serve, and how."""

    served: ServedModelConfig
    place: Place
    wake: DupFdHolder  # the eventfd that wakes the backend, shared by all its rings
    ending: DupFdHolder  # the page by which its end is told; see `transport.ending`
    control: Connection
