"""The eager model's own answers to the payloads, made before the run in a process of its own, which has torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.errors import ModelError
from headrace.model.source import resolve
from headrace.processes import become_child, describe, failures_reported
from headrace.target.jobs import Checked, CheckJob

Array = npt.NDArray[Any]


def run_check_model(job: CheckJob) -> None:
    """Compute, write and report. The target of the process."""
    become_child()
    report: Connection = job.report
    with failures_reported(report, "computing the right answers failed"):
        outputs = eager_outputs(job.model, job.payloads, job.bfloat16)
        arrays = {f"{number}/{name}": array for number, each in enumerate(outputs) for name, array in each.items()}
        np.savez(job.output, **arrays)  # type: ignore[arg-type]
        report.send(Checked())


def eager_outputs(
    name: str, payloads: Sequence[Mapping[str, Array]], bfloat16: frozenset[str] = frozenset()
) -> list[dict[str, Array]]:
    """Return the model's outputs to each payload, by position ("0", "1", ...) or by the names that it gives them.

    Inputs go in by position, in the server's order. Raises ModelError.
    """
    model = resolve(name).build().eval()
    answers = []
    with torch.inference_mode():
        for payload in payloads:
            tensors = [_tensor(array, bits=each in bfloat16) for each, array in payload.items()]
            try:
                answers.append(_named(model(*tensors)))
            except Exception as error:
                raise ModelError(f"--check-model {name}: fails on the payload: {describe(error)}") from error
    return answers


def _tensor(array: Array, *, bits: bool) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array).copy())
    return tensor.view(torch.int16).view(torch.bfloat16) if bits else tensor


def _named(output: object) -> dict[str, Array]:
    if isinstance(output, torch.Tensor):
        output = (output,)
    if isinstance(output, Mapping):
        items = [(str(name), value) for name, value in output.items()]
    elif isinstance(output, tuple | list):
        items = [(str(number), value) for number, value in enumerate(output)]
    else:
        raise ModelError(
            f"the model returned a {type(output).__name__}; tensors, alone, in order or by name, are wanted"
        )
    return {name: _numbers(value) for name, value in items}


def _numbers(value: torch.Tensor) -> Array:
    tensor = value.cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
