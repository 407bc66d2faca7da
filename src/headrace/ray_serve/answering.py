"""What a replica answers, whatever the protocol: the model's metadata, and infer as one call."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from headrace import __version__
from headrace.errors import NotOffered
from headrace.frontend.service import SERVER_NAME
from headrace.ray_serve.model import raw_outputs, tensor_of, told

if TYPE_CHECKING:
    from headrace.ray_serve.model import ReplicaModel

# Statistics and the repository would be one replica's, and the next call meets another one.
EXTENSIONS = ("binary_tensor_data", "model_configuration")
US_PER_S = 1_000_000


def server_metadata() -> dict[str, object]:
    """Return the protocol's server metadata."""
    return {"name": SERVER_NAME, "version": __version__, "extensions": list(EXTENSIONS)}


def require_offered(*, regions: bool, priority: int) -> None:
    """Raise NotOffered for what has no meaning across machines and replicas."""
    if regions:
        raise NotOffered("shared memory of the client's is not offered on Ray: replicas are on other machines; send it")
    if priority:
        raise NotOffered("priority is not offered on Ray, where replicas do not share a queue; leave it out")


async def infer(model: ReplicaModel, data: Sequence[memoryview], rows: int, timeout_us: int) -> list[memoryview]:
    """Return the outputs' bytes for inputs' bytes, both in the model's order. Raises a HeadraceError."""
    tensors = [tensor_of(bytes_, spec, rows) for bytes_, spec in zip(data, model.served.inputs, strict=True)]
    timeout_s = timeout_us / US_PER_S if timeout_us else None
    try:
        return raw_outputs(await asyncio.wrap_future(model.submit(tensors, timeout_s)))
    except Exception as error:
        raise told(error) from error
