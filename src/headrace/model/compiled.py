"""Compiled once, kept in files: later starts load the programs, and neither trace the model nor compile it.

Each batch size has a program of its own, which takes the weights as arguments, so all programs and lanes share one copy
of them. A program is looked up by what the model is and where it runs (`identity`), and tried against the model itself
before it serves: one that is stale is compiled anew. Source: PyTorch's `torch._inductor.standalone_compile`. Its files
are pickled, as those of PyTorch's own cache are: the folder must be the user's.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from headrace.errors import InvalidOption
from headrace.files import whole_file, write_whole
from headrace.processes import describe

_SIMPLE = (int, float, complex, str, bytes, bool, tuple, type(None), torch.dtype)
_OTHERS_MAY_WRITE = 0o022


class NotKept(Exception):
    """The model has no program that could be kept; the message says why."""


class Programs:
    """The compiled model: called as the model is, with the rows of one of its batch sizes."""

    def __init__(self) -> None:
        self._by_rows: dict[int, tuple[Callable[..., Sequence[Tensor]], list[Tensor]]] = {}

    def add(self, rows: int, program: Callable[..., Sequence[Tensor]], weights: list[Tensor]) -> None:
        self._by_rows[rows] = (program, weights)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        program, weights = self._by_rows[len(inputs[0])]
        return tuple(program(*weights, *inputs))


def kept_programs(
    model: nn.Module, inputs: Mapping[int, Sequence[Tensor]], folder: Path, tolerance: float
) -> tuple[Programs, int]:
    """Return the model's programs for these inputs, by rows, and how many had to be made; the others lay in `folder`.

    A program's answers may differ from the model's by `tolerance` (relative L2 error of a whole output). Raises
    NotKept, and InvalidOption for a folder that others may write to.
    """
    _require_private(folder)
    programs = Programs()
    made = 0
    who = identity(model)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for rows, example in inputs.items():
        path = folder / f"{_key(who, example)}.program"
        found = _load_right(path, tensors, model, example, tolerance)
        if found is None:
            _make(model, example, path)
            made += 1
            found = _load_right(path, tensors, model, example, tolerance)
            if found is None:
                raise NotKept("its compiled program answers otherwise than the model itself")
        programs.add(rows, *found)
    return programs, made


def identity(model: nn.Module) -> str:
    """Return a digest of what a program depends on, except for the inputs and the weights' values."""
    digest = hashlib.sha256()
    for fact in _facts(model):
        digest.update(fact.encode(errors="replace") + b"\0")
    return digest.hexdigest()


def _facts(model: nn.Module) -> list[str]:
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    switches = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    facts = [
        torch.__version__,
        str(torch.version.cuda),
        place_of(device),
        repr(switches),
        repr(torch.is_grad_enabled()),
    ]
    for name, part in model.named_modules(remove_duplicate=False):
        values = {key: value for key, value in sorted(vars(part).items()) if isinstance(value, _SIMPLE)}
        facts.append(f"{name} {type(part).__qualname__} {part.extra_repr()} {values!r} {_source(part)}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        facts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}")
    return facts


def place_of(device: torch.device, gpu_name: Callable[[torch.device], str] = torch.cuda.get_device_name) -> str:
    """Say what a program was compiled for: the kind of CPU, or the kind of GPU and its number in this process.

    The number counts, since Inductor writes it into the program: its code selects that device, takes that device's
    stream and loads kernels there, so on another GPU it would be given addresses that are not that device's. An engine
    of a server sees its one GPU as number 0, so engines on GPUs of a kind share their programs all the same. Source:
    PyTorch 2.14, torch/_inductor/codegen/wrapper.py (EnterDeviceContextManagerLine, write_get_raw_stream) and
    torch/_inductor/runtime/hints.py (DeviceProperties).
    """
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    return f"{gpu_name(device)} {device}"


def _source(part: nn.Module) -> str:
    if isinstance(part, GraphModule):
        return part.code
    try:
        return inspect.getsource(type(part))
    except (OSError, TypeError):  # it was made without a file
        return ""


def _key(who: str, inputs: Sequence[Tensor]) -> str:
    shapes = [(tuple(tensor.shape), tensor.stride(), str(tensor.dtype)) for tensor in inputs]
    return hashlib.sha256(f"{who}{shapes!r}".encode()).hexdigest()[:32]


def _make(model: nn.Module, example: Sequence[Tensor], path: Path) -> None:
    """Compile for this example's shapes and write the program and its weights' names. Raises NotKept."""
    from torch._inductor import standalone_compile  # noqa: PLC0415  1 s, which whoever compiles nothing need not pay

    try:
        exported = torch.export.export(model, tuple(example))
        names = [spec.target for spec in exported.graph_signature.input_specs if spec.target is not None]
        values = exported.state_dict | exported.constants
        artifact = standalone_compile(
            exported.graph_module, [*(values[name] for name in names), *example], dynamic_shapes="from_example_inputs"
        )
        with whole_file(path) as part:
            artifact.save(path=str(part), format="binary")
            write_whole(path.with_suffix(".weights"), msgspec.json.encode(names))
    except Exception as error:  # the model's own code, the exporter and the compiler may raise anything
        raise NotKept(describe(error)) from error


def _load(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Callable[..., Sequence[Tensor]], list[Tensor]] | None:
    """Return a kept program and its weights; None if it is not there, damaged, or needs what the model lacks."""
    from torch._inductor.standalone_compile import CompiledArtifact  # noqa: PLC0415  as above

    try:
        names = msgspec.json.decode(path.with_suffix(".weights").read_bytes(), type=list[str])
        weights = [tensors[name] for name in names]
        program: Any = CompiledArtifact.load(path=str(path), format="binary")
    except Exception:  # noqa: BLE001  whatever is wrong with it, it is made anew
        return None
    return program, weights


def _load_right(
    path: Path, tensors: Mapping[str, Tensor], model: nn.Module, example: Sequence[Tensor], tolerance: float
) -> tuple[Callable[..., Sequence[Tensor]], list[Tensor]] | None:
    """Return what `_load` does if it answers as the model, else None."""
    found = _load(path, tensors)
    return found if found is not None and _answers_alike(model, found, example, tolerance) else None


def _answers_alike(
    model: nn.Module,
    found: tuple[Callable[..., Sequence[Tensor]], list[Tensor]],
    example: Sequence[Tensor],
    tolerance: float,
) -> bool:
    program, weights = found
    with torch.no_grad():
        try:
            answers = program(*weights, *example)
        except Exception:  # noqa: BLE001  a program of another model may raise anything
            return False
        expected = model(*example)
    return len(answers) == len(expected) and all(map(lambda a, b: _is_near(a, b, tolerance), answers, expected))


def _is_near(answer: Tensor, expected: Tensor, tolerance: float) -> bool:
    if answer.shape != expected.shape or answer.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return True  # an index may differ where two values are as good as equal
    error, size = (answer - expected).double().norm(), expected.double().norm()
    return bool(error <= tolerance * size) or bool(error == 0)


def _require_private(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True, mode=0o700)
    status = folder.stat()
    if status.st_mode & _OTHERS_MAY_WRITE or status.st_uid not in (0, os.getuid()):
        raise InvalidOption(
            f"--compile-cache {folder}: others may write to this folder, and what is in it is run; choose one of your"
            " own, or chmod go-w it"
        )
