"""Exported programs, path/to/model.pt2: what `torch.export.save` writes, served without the code that made them.

Trust such a file as you would a program: `torch.export.load` unpickles what is in it (PyTorch docs, torch.export.load).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headrace.errors import ModelError
from headrace.processes import describe

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class ExportedModule(nn.Module):
    """A program called with its inputs in order or by name. As it was exported, so it computes, without a mode."""

    def __init__(self, program: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.program = program
        self.names = names

    def forward(self, *ordered: Tensor, **named: Tensor) -> object:
        return self.program(*ordered, *(named[name] for name in self.names[len(ordered) :]))

    def train(self, mode: bool = True) -> ExportedModule:
        self.training = mode  # the program itself refuses to be told
        return self


@dataclass(frozen=True, slots=True)
class Exported:
    """A loaded program whose inputs are tensors of any number of rows."""

    program: ExportedProgram
    names: tuple[str, ...]  # of its inputs, in order

    @classmethod
    def load(cls, path: Path) -> Exported:
        """Read a program. Raises ModelError, also for one whose inputs are not tensors of any number of rows."""
        if not path.is_file():
            raise ModelError(f"--model {path}: there is no such file; write it with torch.export.save")
        try:
            program = torch.export.load(path)
        except Exception as error:  # whatever a damaged file makes of the reader
            raise ModelError(f"--model {path}: no exported program ({describe(error)})") from error
        names = tuple(str(name) for name in program.graph_signature.user_inputs)
        found = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
        for name in names:
            _require_any_rows(path, name, found.get(name))
        if program.example_inputs is None:
            raise ModelError(f"--model {path}: the program has no example inputs; export it with some")
        return cls(program, names)

    def build(self) -> nn.Module:
        return ExportedModule(self.program.module(), self.names)

    def example_inputs(self, _image_size: int) -> dict[str, Tensor]:
        """Return the inputs that it was exported with."""
        positional, named = self.program.example_inputs
        return dict(zip(self.names, (*positional, *named.values()), strict=True))


def _require_any_rows(path: Path, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ModelError(f"--model {path}: input {name} is no tensor; export a model whose inputs all are")
    if not value.ndim or type(value.shape[0]) is int:
        raise ModelError(
            f"--model {path}: input {name} has a fixed number of rows; export with dynamic_shapes that make its first"
            f" dimension a torch.export.Dim, as {{{name!r}: {{0: torch.export.Dim('rows', min=1, max=1024)}}}}"
        )
