"""Step 1 (#115286): the backend runs in the main process, and an executor with one thread computes and answers.

The main thread only polls the request queue, so that polling is never blocked by a forward. The default stream serves
for everything, as in the baseline. Repaired here: the published step discarded the futures and with them every
exception; `answer` turns each into the error response of its request.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from headrace.designs.base import Endpoint, Model, answer

if TYPE_CHECKING:
    from headrace.runtime.device import Device


class Executor:
    def serve(self, endpoint: Endpoint, device: Device, load_model: Callable[[], Model]) -> None:
        """See `Design.serve`."""
        model: Model | None = None
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="predict") as predict:
            for request in endpoint.requests():
                model = load_model() if model is None else model
                predict.submit(answer, endpoint, device, model, request)
