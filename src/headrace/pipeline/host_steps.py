"""What a described model does on the host for every row: between the tensors of clients and those of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headrace.errors import InvalidRequest, ModelError
from headrace.model.signature import Signature
from headrace.processes import describe, without_paths
from headrace.tensors import BYTES, DTYPE_BYTES, TensorSpec
from headrace.wire.elements import cells, fill_cells

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.model.described import Bytes, Described, Value
    from headrace.model.source import Example

EXAMPLE_ROWS = 2  # of the network's example: one could hide an output that has lost its rows
_WRONG_ROW = (ValueError, RuntimeError, OSError)  # what decoders raise


@dataclass(frozen=True, slots=True)
class HostSteps:
    """`inputs` and `outputs` are those of clients. Any number of threads may call both methods.

    Tensors are given and made as one row each: [*features], or the cells of BYTES.
    """

    described: Described
    signature: Signature  # of the network
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def prepare(self, number: int, row: Sequence[Tensor], prepared: Sequence[Tensor]) -> Exception | None:
        """Make a row of the network's inputs from a client's, the request's row of this number.

        Return what went wrong: InvalidRequest or ModelError.
        """
        try:
            given = {spec.name: _read(tensor, spec) for spec, tensor in zip(self.inputs, row, strict=True)}
            made = preprocessed(self.described, given)
            _copy(_in_order(made, self.signature), self.signature.inputs, prepared, "preprocess")
        except (InvalidRequest, ModelError) as error:
            return _without_frames(error)
        except torch.OutOfMemoryError as error:
            return ModelError(without_paths(f"preprocess failed: {describe(error)}"))
        except _WRONG_ROW as error:
            return InvalidRequest(without_paths(f"the model cannot take row {number}: {describe(error)}"))
        except Exception as error:  # noqa: BLE001  the user's own code may raise anything
            return ModelError(without_paths(f"preprocess failed: {describe(error)}"))
        return None

    def finish(self, row: Sequence[Tensor], finished: Sequence[Tensor]) -> Exception | None:
        """Make a row of a client's outputs from the network's. Return what went wrong: ModelError."""
        specs = self.signature.outputs
        try:
            if self.described.postprocess is None:
                _copy(row, specs, finished, "the network")
                return None
            made = self.described.postprocess(
                **{spec.name: value.clone() for spec, value in zip(specs, row, strict=True)}
            )
            for spec, target in zip(self.outputs, finished, strict=True):
                _write(made[spec.name], spec, target)
        except (InvalidRequest, ModelError) as error:
            return ModelError(str(error))
        except Exception as error:  # noqa: BLE001  the user's own code may raise anything
            return ModelError(without_paths(f"postprocess failed: {describe(error)}"))
        return None


def network_example(described: Described) -> Example:
    """Return the description's example as rows of the network's inputs. Raises ModelError if preprocess fails on it."""
    given = {
        name: value if isinstance(value, torch.Tensor) else _elements(value, name, described.inputs[name])
        for name, value in described.example.items()
    }
    try:
        made = preprocessed(described, given)
    except Exception as error:
        raise ModelError(f"preprocess fails on the description's example: {describe(error)}") from error
    rows = {name: torch.stack([tensor] * EXAMPLE_ROWS) for name, tensor in made.items()}
    return tuple(rows.values()) if _LONE in rows else rows


def host_steps(described: Described, signature: Signature, answers: Sequence[Tensor]) -> HostSteps:
    """Return the steps of a description; `answers` are the network's outputs for its example, [rows, *features].

    Raises ModelError if postprocess fails on them, or gives what was not declared.
    """
    inputs = tuple(_spec(name, value, described.inputs) for name, value in described.example.items())
    if described.postprocess is None:
        return HostSteps(described, signature, inputs, signature.outputs)
    named = {spec.name: answer[0].cpu() for spec, answer in zip(signature.outputs, answers, strict=True)}
    try:
        made = described.postprocess(**named)
    except Exception as error:
        raise ModelError(f"postprocess fails on the network's answer to the example: {describe(error)}") from error
    if not isinstance(made, Mapping) or not described.outputs.keys() <= made.keys():
        got = ", ".join(map(str, made)) if isinstance(made, Mapping) else type(made).__name__
        raise ModelError(
            f"postprocess returned {got}; it must return a mapping, with {', '.join(described.outputs) or 'tensors'}"
        )
    outputs = tuple(_spec(name, value, described.outputs) for name, value in made.items())
    return HostSteps(described, signature, inputs, outputs)


_LONE = ""  # the name of a tensor that preprocess returned without one


def preprocessed(described: Described, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a row of the network's inputs by name. Raises ModelError, and whatever preprocess does."""
    made = given if described.preprocess is None else described.preprocess(**given)
    named = {_LONE: made} if isinstance(made, torch.Tensor) else made
    if not isinstance(named, Mapping) or not all(isinstance(each, torch.Tensor) for each in named.values()):
        raise ModelError(f"preprocess returned {type(made).__name__}; it must return a tensor or a mapping of tensors")
    return dict(named)


def _in_order(made: Mapping[str, Tensor], signature: Signature) -> list[Tensor]:
    if _LONE in made:
        return [made[_LONE]]
    return [made[spec.name] for spec in signature.inputs]


def _copy(made: Sequence[Tensor], specs: Sequence[TensorSpec], targets: Sequence[Tensor], whose: str) -> None:
    for tensor, spec, target in zip(made, specs, targets, strict=True):
        if tensor.shape != target.shape or tensor.dtype != target.dtype:
            raise ModelError(
                f"{whose} gave {tensor.dtype} {list(tensor.shape)} for {spec.name}, and {target.dtype}"
                f" {list(target.shape)} for the example; every row must have that shape and dtype"
            )
        target.copy_(tensor)


def _read(tensor: Tensor, spec: TensorSpec) -> object:
    """Return a client's value, in memory of its own: its client could write there meanwhile."""
    if not spec.is_bytes:
        return tensor.clone()
    elements = [bytes(element) for element in cells(tensor.numpy().data, spec)]
    return elements[0] if spec.features in ((), (1,)) else elements


def _write(value: Value, spec: TensorSpec, target: Tensor) -> None:
    if not spec.is_bytes:
        if not isinstance(value, torch.Tensor):
            raise ModelError(f"postprocess gave {type(value).__name__} for {spec.name}, and a tensor for the example")
        _copy([value], [spec], [target], "postprocess")
        return
    fill_cells(target.numpy().data, map(_encoded, _listed(value)), spec)


def _listed(value: Value) -> Sequence[bytes | str]:
    return [value] if isinstance(value, bytes | str) else value  # type: ignore[return-value]  # `_encoded` refuses


def _encoded(element: object) -> bytes:
    if isinstance(element, str):
        return element.encode()
    if not isinstance(element, bytes):
        raise ModelError(f"an element of BYTES is {type(element).__name__}; it must be bytes or str")
    return element


def _elements(value: Value, name: str, declared: Bytes) -> bytes | list[bytes]:
    """Return an example as preprocess gets it. Raises ModelError if it is not what was declared."""
    elements = [_encoded(element) for element in _listed(value)]
    longest = max(map(len, elements), default=0)
    if len(elements) != declared.count or longest > declared.max_bytes:
        raise ModelError(
            f"the example of {name} has {len(elements)} elements of up to {longest} bytes; declared are"
            f" {declared.count} of up to {declared.max_bytes}"
        )
    return elements[0] if declared.shape in ((), (1,)) else elements


def _spec(name: str, value: Value, declared: Mapping[str, Bytes]) -> TensorSpec:
    """Return what a row of a client's tensor is, by an example of it. Raises ModelError."""
    if name in declared:
        _elements(value, name, declared[name])
        return TensorSpec(name=name, dtype=BYTES, features=declared[name].shape, max_bytes=declared[name].max_bytes)
    dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else type(value).__name__
    if not isinstance(value, torch.Tensor) or dtype not in DTYPE_BYTES:
        raise ModelError(
            f"tensor {name} of the description is {dtype}; declare it as Bytes, or make it a tensor of one of"
            f" {', '.join(DTYPE_BYTES)}"
        )
    return TensorSpec(name=name, dtype=dtype, features=tuple(value.shape))


def _without_frames(error: Exception) -> Exception:
    """Return an error that does not keep the row, and with it a ring's memory."""
    error.__traceback__ = None
    return error
