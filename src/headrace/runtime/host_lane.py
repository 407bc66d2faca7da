"""A lane on the host: a thread of its own that runs batches in order, as a CUDA stream would.

The model reads a batch's rows in the table itself where they lie together and need no padding; else they are copied
into the lane's own buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import torch

from headrace.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.request import Batch

FlatModel = Callable[..., "tuple[Tensor, ...]"]  # tensors [bucket, *features] in, and out


class HostLane:
    """`padded`: the model is compiled for the buckets and must get one of them; else it gets the rows there are."""

    def __init__(self, model: FlatModel, inputs: Sequence[Tensor], *, padded: bool) -> None:
        self._model = model
        self._inputs = inputs  # [largest bucket, *features], the lane's own
        self._padded = padded
        self._thread = ThreadPoolExecutor(1, "lane")

    def launch(self, batch: Batch) -> None:
        """See `dispatch.Lane`."""
        batch.token = self._thread.submit(self._run, batch)

    def done(self, batch: Batch) -> bool:
        """See `dispatch.Lane`."""
        return cast("Future[None]", batch.token).done()

    def wait(self, batch: Batch) -> None:
        """See `dispatch.Lane`."""
        cast("Future[None]", batch.token).result()

    def replay(self, bucket: int) -> None:
        """See `wiring.RawLane`."""
        self._thread.submit(self._forward, [buffer[:bucket] for buffer in self._inputs])

    def synchronize(self) -> None:
        """See `wiring.RawLane`."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        self._thread.shutdown()

    @torch.no_grad()
    def _forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self._model(*inputs)

    def _run(self, batch: Batch) -> None:
        inputs = self._gather(batch)
        outputs = self._forward(inputs)
        require_rows(outputs, len(inputs[0]))
        for segment, rows in batch.pieces():
            for output, table_output in zip(outputs, segment.table.outputs, strict=True):
                table_output[segment.slice].copy_(output[rows])

    def _gather(self, batch: Batch) -> tuple[Tensor, ...]:
        rows = batch.bucket if self._padded else batch.rows
        if len(batch.segments) == 1 and batch.rows == rows:
            only = batch.segments[0]
            return tuple(each[only.slice] for each in only.table.inputs)
        for segment, part in batch.pieces():
            for buffer, table_input in zip(self._inputs, segment.table.inputs, strict=True):
                buffer[part].copy_(table_input[segment.slice])
        return tuple(buffer[:rows] for buffer in self._inputs)


def require_rows(outputs: Sequence[Tensor], rows: int) -> None:
    """Raise ModelError unless every output has a row for every row: fewer could be spread over all unseen."""
    for number, output in enumerate(outputs):
        if not output.ndim or len(output) != rows:
            raise ModelError(
                f"the model's output {number} has shape {list(output.shape)} for {rows} rows; its first dimension must"
                " be the rows"
            )
