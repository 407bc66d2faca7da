"""The model's side of the servers that leave it to their user: the same code for all, so that the servers are compared.

A batch of request bodies becomes a batch of answers: rows are gathered in pinned memory, padded to a bucket that was
warmed at start, copied to the device, computed, and copied back. (On the CPU, uncompiled, padding would only cost.)
Requests of several rows may make more rows than the largest bucket; then it takes several turns.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch._dynamo
from models import build
from settings import ROW_SHAPE, Settings
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Floats = npt.NDArray[np.float32]


class Predictor:
    """Answers batches of raw rows."""

    def __init__(self, settings: Settings) -> None:
        began = time.perf_counter()
        self._settings = settings
        self._device = torch.device(settings.device)
        self._dtype = DTYPES[settings.precision]
        self._pads = settings.compile or settings.device != "cpu"
        convolves = settings.model != "tiny"
        self._layout = torch.channels_last if convolves else torch.contiguous_format
        torch.backends.cudnn.allow_tf32 = settings.precision == "tf32"
        torch.backends.cudnn.benchmark = True
        torch._dynamo.config.recompile_limit = 64  # noqa: SLF001  # one for each bucket; 8 by default, then eager
        if settings.device == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (settings.engines * settings.workers)))
        self._model, compiled = self._prepared(build(settings.model, Path(settings.folder)))
        pinned = settings.device != "cpu"
        size = (settings.max_batch_size, *ROW_SHAPE)
        self._staging = [torch.zeros(size, pin_memory=pinned) for _ in range(2 if pinned else 1)]
        self._copied = [torch.cuda.Event() for _ in self._staging] if pinned else []
        self._warm()
        self._tell(compiled, time.perf_counter() - began)

    def __call__(self, bodies: Sequence[bytes]) -> list[bytes]:
        """Return for each body, rows of float32 in row-major order, its rows' answers in the same form."""
        rows = [np.frombuffer(body, np.float32).reshape(-1, *ROW_SHAPE) for body in bodies]
        answers = self.rows(rows)
        ends = np.cumsum([len(part) for part in rows])
        return [part.tobytes() for part in np.split(answers, ends[:-1])]

    def rows(self, parts: Sequence[Floats]) -> Floats:
        """Return the answers [rows, 1000] to all rows of `parts`, each [n, 3, 250, 250], in order."""
        limit = self._settings.max_batch_size
        pieces = [piece for part in parts for piece in _split(part, limit)]
        found: list[Tensor] = []
        gathered: list[Floats] = []
        for piece in pieces:
            if gathered and sum(map(len, gathered)) + len(piece) > limit:
                found.append(self._launch(gathered, len(found)))
                gathered = []
            gathered.append(piece)
        found.append(self._launch(gathered, len(found)))
        answers = torch.cat(found) if len(found) > 1 else found[0]
        return answers.float().cpu().numpy()

    @torch.inference_mode()
    def _launch(self, pieces: Sequence[Floats], turn: int) -> Tensor:
        """Start a batch and return its answers, on the device."""
        count = sum(map(len, pieces))
        bucket = next(size for size in self._settings.buckets if size >= count) if self._pads else count
        place = turn % len(self._staging)
        staging = self._staging[place]
        if self._copied:
            self._copied[place].synchronize()
        np.concatenate(pieces, out=staging.numpy()[:count])
        batch = staging[:bucket].to(self._device, non_blocking=True)
        if self._copied:
            self._copied[place].record()
        batch = batch.to(self._dtype, memory_format=self._layout)
        answers: Tensor = self._model(batch)[:count]
        # A graph's output is overwritten by its next run.
        return answers.clone() if "reduce-overhead" in self._settings.compile_mode else answers

    def _prepared(self, model: nn.Module) -> tuple[Callable[[Tensor], Tensor], str]:
        """Return what is called, and in words whether it is compiled."""
        model = model.to(self._device, self._dtype, memory_format=self._layout)
        if not self._settings.compile:
            return model, "eager"
        mode = self._settings.compile_mode
        compiled = torch.compile(model, dynamic=False, mode=None if mode == "default" else mode)
        try:
            with torch.inference_mode():
                compiled(self._example(self._settings.max_batch_size))
        except Exception as error:  # noqa: BLE001  # whatever the compiler raises; the run goes on and says so
            return model, f"eager, since compilation failed: {type(error).__name__}: {error}"
        return compiled, f"compiled ({mode})"

    def _example(self, rows: int) -> Tensor:
        batch = torch.zeros(rows, *ROW_SHAPE, device=self._device, dtype=self._dtype)
        return batch.contiguous(memory_format=self._layout)

    def _warm(self) -> None:
        for bucket in self._settings.buckets:
            for _ in range(3):
                self.rows([np.zeros((bucket, *ROW_SHAPE), np.float32)])

    def _tell(self, compiled: str, ready_s: float) -> None:
        facts = {"torch": torch.__version__, "model": compiled, "ready_s": ready_s, "threads": torch.get_num_threads()}
        path = Path(self._settings.info_folder) / f"{os.getpid()}.json"
        path.write_text(json.dumps(facts))


def _split(part: Floats, limit: int) -> list[Floats]:
    return [part[begin : begin + limit] for begin in range(0, len(part), limit)]
