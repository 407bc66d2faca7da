"""What a design is, and the three things it is given: an endpoint, a device, and a way to load the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch

from headrace.clock import now_ns
from headrace.errors import ModelError
from headrace.request import Request, Timeline

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.runtime.device import Device

Model = Callable[["Tensor"], object]


class Endpoint(Protocol):
    """Where requests come from and answers go; `transport.queue.QueueEndpoint` is one."""

    def requests(self) -> Iterator[Request]:
        """Yield requests until the client closes."""

    def respond(self, request: Request, output: Tensor) -> None:
        """Answer with a tensor on the CPU."""

    def fail(self, request: Request, error: Exception) -> None:
        """Answer with an error."""


class Design(Protocol):
    """Moves every request from the endpoint through the model and back, each exactly once."""

    def serve(self, endpoint: Endpoint, device: Device, load_model: Callable[[], Model]) -> None:
        """Answer requests until the client closes; then return, with all threads ended.

        The model is loaded when the first request has arrived, so warm-up latency contains it, as published. An
        exception in any stage becomes the error response of its request. Errors of `load_model` are raised.
        """


def forward(model: Model, inputs: Tensor, timeline: Timeline) -> Tensor:
    """Run the model without gradients and stamp the call. Raises ModelError if the result is not one tensor of rows."""
    timeline.started_ns = now_ns()
    with torch.no_grad():
        output = model(inputs)
    timeline.computed_ns = now_ns()
    if not isinstance(output, torch.Tensor):
        raise ModelError(
            f"the model returned {type(output).__name__}; this design answers with one tensor, so wrap the model to"
            " return one"
        )
    if not output.ndim or output.shape[0] != inputs.shape[0]:
        raise ModelError(
            f"the model returned shape {list(output.shape)} for {inputs.shape[0]} rows; the first dimension of the"
            " output must be the rows"
        )
    return output


def answer(endpoint: Endpoint, device: Device, model: Model, request: Request) -> None:
    """Copy in, compute, copy out and respond, on the calling thread."""
    try:
        inputs = request.inputs.to(device.torch_device, non_blocking=True)
        output = forward(model, inputs, request.timeline).cpu()
    except Exception as error:  # noqa: BLE001  whatever it is, its request is told
        endpoint.fail(request, error)
    else:
        endpoint.respond(request, output)
