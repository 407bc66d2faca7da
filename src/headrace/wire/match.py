"""What a request's tensors must be so that a model can take them. Alike over HTTP and gRPC."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar

from headrace.errors import InvalidRequest
from headrace.tensors import TensorSpec
from headrace.wire.datatypes import FROM_DTYPE
from headrace.wire.elements import require_packed_bytes
from headrace.wire.places import RegionPlace, region_place

MOST_ROWS = 2**31 - 1  # of a request's tensors: no ring holds more, and their bytes still are numbers of a machine


class Tensor(Protocol):
    """An input as a request describes it."""

    @property
    def name(self) -> str: ...
    @property
    def datatype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...


TensorT = TypeVar("TensorT", bound=Tensor)


@dataclass(frozen=True, slots=True)
class OutputPlace:
    number: int  # of the output, in the model's order
    place: RegionPlace | None  # where it is to be written; None: into the response


def matched(given: Sequence[TensorT], specs: Sequence[TensorSpec]) -> dict[str, TensorT]:
    """Return a request's inputs by name, in the model's order. Raises InvalidRequest if they are not the model's."""
    names = [tensor.name for tensor in given]
    wanted = [spec.name for spec in specs]
    if sorted(names) != sorted(wanted):
        raise InvalidRequest(f"inputs {', '.join(names) or 'none'} were given; the model takes {', '.join(wanted)}")
    by_name = {tensor.name: tensor for tensor in given}
    for spec in specs:
        _require_match(by_name[spec.name], spec)
    return {name: by_name[name] for name in wanted}


def common_rows(tensors: Iterable[Tensor]) -> int:
    """Return how many rows each of the inputs has. Raises InvalidRequest if they differ."""
    rows = {tensor.shape[0] for tensor in tensors}
    if len(rows) != 1:
        raise InvalidRequest(f"the inputs have {' and '.join(map(str, sorted(rows)))} rows; all need the same number")
    return rows.pop()


def packed_bytes(tensor: Tensor, spec: TensorSpec, given: object, where: str) -> int:
    """Return how many bytes an input has where it says so. Raises InvalidRequest unless its shape can have as many."""
    rows = tensor.shape[0]
    if spec.is_bytes:
        return require_packed_bytes(spec, given, rows, where)
    needed = rows * spec.row_bytes
    if type(given) is not int or given != needed:
        raise InvalidRequest(
            f"input {tensor.name} has {given!r:.80} bytes in {where}; its shape {list(tensor.shape)} needs {needed}"
        )
    return needed


def output_places(
    asked: Iterable[tuple[str, Mapping[str, object]]], outputs: Sequence[TensorSpec]
) -> list[OutputPlace]:
    """Return which outputs a request asks for, by name and parameters, and where it wants them.

    Raises InvalidRequest for names that the model does not have, or that are asked for twice.
    """
    numbers = {spec.name: number for number, spec in enumerate(outputs)}
    places = []
    for name, parameters in asked:
        if name not in numbers:
            raise InvalidRequest(
                f"output {name} was asked for; the model gives {', '.join(spec.name for spec in outputs)}"
            )
        if "classification" in parameters:
            raise InvalidRequest(f"output {name}: classification is not offered; ask for the tensor")
        places.append(OutputPlace(numbers[name], region_place(f"output {name}", parameters)))
    for first, second in pairwise(sorted(place.number for place in places)):
        if first == second:
            raise InvalidRequest(f"output {outputs[first].name} was asked for more than once; ask for each once")
    return places


def _require_match(tensor: Tensor, spec: TensorSpec) -> None:
    datatype = FROM_DTYPE[spec.dtype]
    if tensor.datatype != datatype:
        raise InvalidRequest(f"input {tensor.name} has datatype {tensor.datatype}; the model takes {datatype}")
    shape = tuple(tensor.shape)
    if spec.is_bytes and spec.features == (1,) and len(shape) == 1:  # one element a row: clients say it either way
        shape = (*shape, 1)
    if len(shape) != len(spec.features) + 1 or shape[1:] != spec.features or shape[0] < 1:
        wanted = ", ".join(["rows", *map(str, spec.features)])
        raise InvalidRequest(
            f"input {tensor.name} has shape {list(tensor.shape)}; the model takes [{wanted}], rows at least 1"
        )
    if shape[0] > MOST_ROWS:
        raise InvalidRequest(f"input {tensor.name} has more than {MOST_ROWS} rows; split the request")
