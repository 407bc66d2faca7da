"""The baseline: the backend is a process of its own with one loop of get, copy in, forward, copy out, put.

Everything happens on one thread and on the default stream, one after the other. Repaired here: an exception becomes
the error response of its request instead of ending the process in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from headrace.designs.base import Endpoint, Model, answer

if TYPE_CHECKING:
    from headrace.runtime.device import Device


class Original:
    def serve(self, endpoint: Endpoint, device: Device, load_model: Callable[[], Model]) -> None:
        """See `Design.serve`."""
        model: Model | None = None
        for request in endpoint.requests():
            model = load_model() if model is None else model
            answer(endpoint, device, model, request)
