"""What a model takes and gives: named tensors in, nested tensors out, both as flat lists inside the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from headrace.errors import InvalidRequest, ModelError
from headrace.processes import describe
from headrace.tensors import DTYPE_BYTES, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

Inputs = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]


class FlatModel(nn.Module):
    """A model called with a flat list of tensors, which returns a flat tuple of contiguous ones."""

    def __init__(self, model: nn.Module, names: tuple[str, ...] | None) -> None:
        super().__init__()
        self.model = model
        self.names = names  # None: the inputs are positional

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = {} if self.names is None else dict(zip(self.names, inputs, strict=True))
        output = self.model(**named) if named else self.model(*inputs)
        return tuple(leaf.contiguous() for leaf in pytree.tree_leaves(output))


@dataclass(frozen=True, slots=True)
class Signature:
    """Specs of one row of every tensor, and how to put outputs together again."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    keyword: bool  # the inputs are passed by name
    tree: Any  # pytree.TreeSpec of the outputs

    @property
    def names(self) -> tuple[str, ...] | None:
        """Return the keywords of the model's call; None where it is called with positions."""
        return tuple(spec.name for spec in self.inputs) if self.keyword else None

    def flatten(self, given: Inputs) -> list[Tensor]:
        """Return a request's tensors in order, checked. Raises InvalidRequest, naming the tensor, value and remedy."""
        tensors = _in_order(given, self.inputs)
        rows = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
        if len(rows) != 1 or 0 in rows:
            raise InvalidRequest(
                f"the inputs have {' and '.join(str(count) for count in sorted(rows))} rows; all need the same number,"
                " at least 1"
            )
        for spec, tensor in zip(self.inputs, tensors, strict=True):
            _require_match(spec, tensor)
        return tensors

    def named(self, given: Inputs) -> dict[str, Tensor]:
        """Return a request's tensors by name, in order, their shapes not looked at. Raises InvalidRequest."""
        names = [spec.name for spec in self.inputs]
        return dict(zip(names, _in_order(given, self.inputs), strict=True))

    def unflatten(self, outputs: Sequence[Tensor]) -> object:
        """Return outputs nested as the model returned them."""
        return pytree.tree_unflatten(list(outputs), self.tree)


def signature_of(model: nn.Module, example: Inputs) -> Signature:
    """Call the model once with example inputs, on their device, and return what goes in and comes out.

    Raises ModelError if the model fails on them, or gives anything but tensors with a row for every row.
    """
    named = isinstance(example, Mapping)
    tensors = dict(example) if isinstance(example, Mapping) else _numbered(example)
    inputs = tuple(_spec(name, tensor) for name, tensor in tensors.items())
    rows = len(next(iter(tensors.values())))
    try:
        with torch.no_grad():
            output = model(**tensors) if named else model(*tensors.values())
    except Exception as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ModelError(f"the model fails on the example inputs ({shapes}): {describe(error)}") from error
    paths, tree = pytree.tree_flatten_with_path(output)
    outputs = tuple(_output_spec(_path_name(path), leaf, rows) for path, leaf in paths)
    return Signature(inputs=inputs, outputs=outputs, keyword=named, tree=tree)


def _numbered(example: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    tensors = [example] if isinstance(example, torch.Tensor) else list(example)
    return {f"input_{number}": tensor for number, tensor in enumerate(tensors)}


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"tensor {name} is {dtype}; the lanes carry {', '.join(DTYPE_BYTES)}")
    if not tensor.ndim:
        raise ModelError(f"tensor {name} has no dimensions; its first must be the rows")
    return TensorSpec(name=name, dtype=dtype, features=tuple(tensor.shape[1:]))


def _path_name(path: Sequence[object]) -> str:
    """Return "output" for a lone tensor, else where it is nested, as "scores" or "more.0"."""
    parts = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path]
    return ".".join(map(str, parts)) or "output"


def _output_spec(name: str, leaf: object, rows: int) -> TensorSpec:
    if not isinstance(leaf, torch.Tensor):
        raise ModelError(f"the model's output {name} is {type(leaf).__name__}; every output must be a tensor")
    if not leaf.ndim or len(leaf) != rows:
        raise ModelError(
            f"the model's output {name} has shape {list(leaf.shape)} for {rows} rows; its first dimension must be the"
            " rows"
        )
    return _spec(name, leaf)


def _in_order(given: Inputs, specs: tuple[TensorSpec, ...]) -> list[Tensor]:
    names = [spec.name for spec in specs]
    if isinstance(given, Mapping):
        if set(given) != set(names):
            raise InvalidRequest(f"inputs {', '.join(given)} were given; the model takes {', '.join(names)}")
        return [given[name] for name in names]
    tensors = [given] if isinstance(given, torch.Tensor) else list(given)
    if len(tensors) != len(names):
        raise InvalidRequest(f"{len(tensors)} inputs were given; the model takes {len(names)}: {', '.join(names)}")
    return tensors


def _require_match(spec: TensorSpec, tensor: Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != spec.dtype or tuple(tensor.shape[1:]) != spec.features:
        wanted = ["rows", *spec.features]
        raise InvalidRequest(
            f"input {spec.name} is {dtype} of shape {list(tensor.shape)}; the model takes {spec.dtype} of shape"
            f" [{', '.join(str(size) for size in wanted)}]"
        )
