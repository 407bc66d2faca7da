"""What the model itself answers: eagerly, in chunks, by no design. Measured answers are compared with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from headrace.config import ModelConfig
from headrace.errors import ModelError
from headrace.model.load import load_model
from headrace.processes import describe


def compute_reference(
    config: ModelConfig, checkpoint: Path | None, rows: Tensor, device: torch.device, chunk: int = 32
) -> npt.NDArray[np.float32]:
    """Return the eager model's answers to `rows` [distinct, *features], float32 [distinct, *out] on the CPU.

    Never compiled, whatever `config` says; precision and number of threads are the process's own (PyTorch's
    default, all cores, is right here: nothing is measured yet). Raises ModelError if the model cannot be
    loaded, fails, or returns anything but one tensor with a row for every row.
    """
    model = load_model(replace(config, compile=False), checkpoint, device, lambda _stage: None)
    with torch.inference_mode():
        answers = [_answer(model, part, device) for part in torch.split(rows, chunk)]
    return torch.cat(answers).numpy()


def _answer(model: nn.Module, rows: Tensor, device: torch.device) -> Tensor:
    try:
        output = model(rows.to(device))
    except Exception as error:
        raise ModelError(
            f"the model fails on rows of shape {list(rows.shape)}: {describe(error)};"
            " it must take float32 images [rows, 3, height, width] (see --image-size)"
        ) from error
    if not isinstance(output, Tensor):
        raise ModelError(f"the model returned {_content(output)}; it must return one tensor, a row for every row")
    if output.ndim == 0 or len(output) != len(rows):
        raise ModelError(
            f"the model returned shape {list(output.shape)} to {len(rows)} rows; its first dimension must be the rows"
        )
    return output.float().cpu()


def _content(output: object) -> str:
    if isinstance(output, tuple | list | dict):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"
