"""The two queues between a client and a backend. No torch here: the supervisor makes them and does not compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import multiprocessing as mp

    from torch import Tensor

    from headrace.request import Response


@dataclass(frozen=True, slots=True)
class QueuePair:
    """Made by the supervisor, handed to both sides. None on `requests` ends the run."""

    requests: mp.Queue[tuple[int, Tensor] | None]
    responses: mp.Queue[Response]
