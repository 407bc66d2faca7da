"""A model with its own steps on the host, before and after it: image files in, labels out.

def build():
    return Described(
        Sequential(FromImages(224), resnet18(), TopLabels(5)),
        inputs={"image": Bytes(max_bytes=1 << 20)},
        preprocess=lambda image: decode_jpeg(image, size=224),
        outputs={"names": Bytes(max_bytes=64, shape=(5,))},
        postprocess=lambda labels, scores: {"names": [NAMES[label] for label in labels], "scores": scores},
        example={"image": Path("cat.jpg").read_bytes()},
    )
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from headrace.errors import InvalidOption, ModelError

MOST_BYTES = 1 << 30  # of an element
MOST_ROWS = 65536  # of a batch

Value = Tensor | bytes | str | Sequence[bytes | str]  # of one row


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """A tensor of datatype BYTES: elements of any length up to `max_bytes`, so many in a row as `shape` says.

    Every row of a server's shared memory has room for all of them at their longest. Raises ModelError.
    """

    max_bytes: int
    shape: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if not 1 <= self.max_bytes <= MOST_BYTES:
            raise ModelError(f"max_bytes is {self.max_bytes}; it must be 1 to {MOST_BYTES}")
        if not all(size >= 1 for size in self.shape):
            raise ModelError(f"a tensor of BYTES has shape {list(self.shape)}; every size must be at least 1")

    @property
    def count(self) -> int:
        """Return how many elements a row has."""
        return math.prod(self.shape)


class Described(nn.Module):
    """A network, and what the server does on its CPUs for every row before it and after it.

    `preprocess` is called with a row's inputs by name, an element of BYTES as `bytes` (as a list of them, in order,
    where a row has more than one), numbers as a tensor without the row's dimension. It returns one row of the network's
    inputs: a tensor, or a mapping of them by the names of the network's arguments, of the same shapes and dtypes every
    time. Several threads call it at once. ValueError, RuntimeError and OSError mean that the row is wrong: its request,
    and no other, is answered with them as invalid.

    `postprocess` is called with a row of the network's outputs by name (`output`, if there is one without a name), and
    returns a mapping: tensors, or bytes, str or lists of them for what `outputs` declares.

    `example` is one row as a client sends it. `max_batch_size` and `max_queue_delay_us` hold where the server's options
    do not say otherwise. Raises ModelError.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        example: Mapping[str, Value],
        inputs: Mapping[str, Bytes] | None = None,
        preprocess: Callable[..., Tensor | Mapping[str, Tensor]] | None = None,
        outputs: Mapping[str, Bytes] | None = None,
        postprocess: Callable[..., Mapping[str, Value]] | None = None,
        **batching: int,
    ) -> None:
        super().__init__()
        self.network = network
        self.inputs = dict(inputs or {})
        self.outputs = dict(outputs or {})
        self.preprocess = preprocess
        self.postprocess = postprocess
        self.example = dict(example)
        self.max_batch_size = batching.pop("max_batch_size", None)
        self.max_queue_delay_us = batching.pop("max_queue_delay_us", 0)
        self._require_sense(batching)

    @property
    def has_steps(self) -> bool:
        return self.preprocess is not None or self.postprocess is not None

    def forward(self, *args: Any, **kwargs: Any) -> object:  # noqa: ANN401
        """Call the network alone."""
        return self.network(*args, **kwargs)

    def _require_sense(self, unknown: Mapping[str, int]) -> None:
        given = {name for name, value in self.example.items() if not isinstance(value, Tensor)}
        if unknown:
            raise ModelError(f"a description takes no {', '.join(unknown)}; see the arguments of Described")
        if not self.example or given != self.inputs.keys():
            raise ModelError(
                f"the example has {', '.join(sorted(given)) or 'nothing'} that are no tensors, and inputs declare"
                f" {', '.join(sorted(self.inputs)) or 'nothing'}: give an example of every input, and Bytes for each"
                " that is no tensor"
            )
        if self.inputs and self.preprocess is None:
            raise ModelError(f"input {next(iter(self.inputs))} is BYTES, which no network takes; give a preprocess")
        if self.outputs and self.postprocess is None:
            raise ModelError(f"output {next(iter(self.outputs))} is BYTES, which no network gives; give a postprocess")
        if self.max_batch_size is not None and not 1 <= self.max_batch_size <= MOST_ROWS:
            raise ModelError(f"max_batch_size is {self.max_batch_size}; it must be 1 to {MOST_ROWS}")
        if self.max_queue_delay_us < 0:
            raise ModelError(f"max_queue_delay_us is {self.max_queue_delay_us}; it cannot be negative")


def require_no_steps(model: nn.Module) -> None:
    """Raise InvalidOption for a model with steps of its own on the host: only `headrace serve` runs them."""
    if isinstance(model, Described) and model.has_steps:
        raise InvalidOption(
            "the model has steps of its own on the host (preprocess, postprocess), which only headrace serve runs; give"
            " its network alone, or serve it with headrace serve"
        )
