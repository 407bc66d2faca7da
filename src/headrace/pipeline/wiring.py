"""From a model to lanes that are ready: compiled, warmed and captured for every bucket, on one thread, before serving.

`torch.compile` is not thread-safe, so every bucket is compiled and warmed here, by the calling thread, and captured
into graphs of each lane; serving only replays, and Dynamo never runs again. A model that cannot be captured runs
eagerly, or compiled under one lock, and the reason is kept.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn

from headrace.config import LanesConfig, Precision
from headrace.errors import HeadraceError, ModelError
from headrace.model.compiled import NotKept, Programs, kept_programs
from headrace.model.optimise import Normalise, OptimiseConfig, StemForm
from headrace.pipeline import dispatch
from headrace.pipeline.batch import BatchingConfig
from headrace.processes import describe
from headrace.runtime.cuda_lane import CopyStream, CudaLane, EagerCudaLane
from headrace.runtime.host_lane import FlatModel, HostLane

if TYPE_CHECKING:
    from torch import Tensor

BEST_STEM: Mapping[str, StemForm] = {
    "bf16": "space-to-depth",
    "fp16": "pad",
    "int8": "space-to-depth",  # convolutions stay bf16
    "fp8": "space-to-depth",
}
WARM_CALLS = 2  # the first compiles, the second is the first of its kind: cuDNN has chosen, memory is there


class RawLane(dispatch.Lane, Protocol):
    """A lane that can also run the model alone, on what its buffers hold, to measure what the device can do."""

    def replay(self, bucket: int) -> None:
        """Begin one run of the model without any copy. Does not wait."""

    def synchronize(self) -> None:
        """Return when all has been done."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LaneSet:
    """Ready lanes. `form` is how they run the model; `notes` say what was asked for and could not be had."""

    lanes: tuple[RawLane, ...]
    device: torch.device
    make_lane: Callable[[int], RawLane]  # one more, like them, with so many slots
    form: str  # "CUDA graphs", "eager", "compiled under a lock", "host"
    notes: tuple[str, ...]
    compilations: int  # so far in this process, by Dynamo's own count

    def recompiles(self) -> int:
        """Return how often Dynamo has compiled since the lanes were ready: 0, if all is well."""
        return compilations() - self.compilations

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneBuilder:
    """Everything that lanes are made from. `example` are tensors on the host, [rows, *features], at least one row."""

    model: nn.Module  # flat: tensors in, a tuple of contiguous tensors out; on the device
    example: Sequence[Tensor]
    device: torch.device
    num_lanes: int
    compile: bool
    config: LanesConfig
    mark: Callable[[str], None]  # told "compile" and "capture" when they are done
    keep: Path | None = None  # folder of compiled programs; None: compile at every start
    tolerance: float = 0.1  # how far a kept program's answers may be from the model's: see `optimise.tolerance`

    def build(self) -> LaneSet:
        """Return ready lanes. Raises ModelError if the model fails, or the device's memory does not suffice."""
        try:
            notes: list[str] = []
            model = self._compiled(notes)
            self.mark("compile" if self.compile else "warm-up")
            form, make_lane = self._form(model, notes)
            lanes = tuple(make_lane(self.config.depth) for _ in range(self.num_lanes))
            self.mark("lanes")
        except torch.OutOfMemoryError as error:
            raise ModelError(_out_of_memory(self, error)) from error
        except HeadraceError:
            raise
        except Exception as error:  # the model's own code may raise anything
            shapes = ", ".join(str(list(tensor.shape)) for tensor in self.example)
            raise ModelError(f"the model fails on example inputs of shape {shapes}: {describe(error)}") from error
        return LaneSet(lanes, self.device, make_lane, form, tuple(notes), compilations())

    def _form(self, model: FlatModel, notes: list[str]) -> tuple[str, Callable[[int], RawLane]]:
        """Return how lanes of this model work, and what makes one."""
        if self.device.type == "cpu":
            # Several threads that check Dynamo's guards at once make it compile again (seen in 20 of 100 runs).
            run = _locked(model) if self._is_dynamos(model) and self.num_lanes > 1 else model
            return "host", lambda _slots: HostLane(run, self._buffers(), padded=self.compile)
        if self.config.graphs:
            try:
                self._captured(model, self.config.buckets[:1], None, 1).close()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                torch.cuda.synchronize(self.device)
                notes.append(f"the model cannot be captured into a CUDA graph, so it runs without ({describe(error)})")
            else:
                copies = CopyStream(self.device) if self.config.prefetch else None
                return "CUDA graphs", lambda slots: self._captured(model, self.config.buckets, copies, slots)
        name, called = ("compiled under a lock", _locked(model)) if self._is_dynamos(model) else ("eager", model)
        return name, lambda _slots: EagerCudaLane(called, self._buffers(), spin=self.config.spin)

    def _compiled(self, notes: list[str]) -> FlatModel:
        """Return what the lanes call, warm for every bucket."""
        buffers = self._buffers()
        inputs = {bucket: [tensor[:bucket] for tensor in buffers] for bucket in self.config.buckets}
        if self.compile and self.keep is not None:
            try:
                programs, _ = kept_programs(self.model, inputs, self.keep, self.tolerance)
            except NotKept as error:
                notes.append(f"the compiled model cannot be kept for the next start ({error})")
            else:
                self._warm(programs, inputs)
                return programs
        if self.compile:
            torch._dynamo.config.recompile_limit = max(  # noqa: SLF001  its public way in; one entry per bucket
                torch._dynamo.config.recompile_limit,  # noqa: SLF001
                2 * len(self.config.buckets) + 8,
            )
            model = cast("FlatModel", torch.compile(self.model, fullgraph=True, dynamic=False))
            try:
                self._warm(model, inputs)
            except torch._dynamo.exc.TorchDynamoException as error:  # noqa: SLF001
                notes.append(f"the model cannot be compiled, so it runs uncompiled ({describe(error)})")
            else:
                return model
        self._warm(self.model, inputs)
        return self.model

    def _is_dynamos(self, model: FlatModel) -> bool:
        """Tell whether calling it runs Dynamo's guards, which several threads must not do at once."""
        return model is not self.model and not isinstance(model, Programs)

    def _warm(self, model: FlatModel, inputs: Mapping[int, Sequence[Tensor]]) -> None:
        with torch.no_grad():
            for example in inputs.values():
                for _ in range(WARM_CALLS):
                    model(*example)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _buffers(self) -> list[Tensor]:
        """Return a lane's static inputs, [largest bucket, *features], filled with the example over and over."""
        largest = self.config.buckets[-1]
        rows = torch.arange(largest, device=self.device)
        return [tensor.to(self.device)[rows % len(tensor)] for tensor in self.example]

    def _captured(self, model: FlatModel, buckets: Sequence[int], copies: CopyStream | None, slots: int) -> CudaLane:
        buffers = [self._buffers() for _ in range(slots)]
        lane = CudaLane(buffers, copies, spin=self.config.spin)
        for bucket in reversed(buckets):  # the largest first: the smaller ones fit into its memory
            lane.capture(model, bucket)
        return lane


def optimise_config(
    config: LanesConfig, precision: Precision, normalise: Normalise | None, device: torch.device
) -> OptimiseConfig:
    """Return what is done to the model before lanes are made of it."""
    pays = device.type == "cuda" and precision in BEST_STEM
    best_stem = BEST_STEM[precision] if pays else "keep"
    return OptimiseConfig(
        precision=precision,
        channels_last=config.channels_last,
        fold_batch_norm=config.fold_batch_norm,
        fuse_epilogues=pays if config.fuse_epilogues is None else config.fuse_epilogues,
        stem=best_stem if config.stem == "auto" else config.stem,
        pointwise_as_matmul=pays if config.pointwise_as_matmul is None else config.pointwise_as_matmul,
        normalise=normalise,
    )


def batching_config(config: LanesConfig) -> BatchingConfig:
    """Return when the lanes' batches close."""
    return BatchingConfig(buckets=config.buckets, max_queue_delay_us=config.max_queue_delay_us)


def stand_in(tensor: Tensor) -> Tensor:
    """Return values of the same shape and type that no request depends on: noise, or 0 where numbers may be indexes.

    Noise and not zeros, since a GPU runs faster on those.
    """
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, dtype=torch.float32).to(tensor.dtype)
    if tensor.dtype == torch.uint8:
        return torch.randint(0, 256, tensor.shape, dtype=torch.uint8)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def keep_compiled_code(folder: Path | None) -> None:
    """Have `torch.compile` keep its results in `folder`, and look for them there; None leaves PyTorch's own place.

    Call before the first compilation of the process. Source: PyTorch docs, "Compile Time Caching in torch.compile".
    """
    if folder is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())


def compilations() -> int:
    """Return how many graphs Dynamo has compiled in this process: none, if it was never imported, which takes 1 s."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])  # no public counter


def _locked(model: FlatModel) -> FlatModel:
    lock = threading.Lock()

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with lock:
            return model(*inputs)

    return run


def _out_of_memory(builder: LaneBuilder, error: torch.OutOfMemoryError) -> str:
    free, total = torch.cuda.mem_get_info(builder.device)
    return (
        f"{builder.num_lanes} lanes with buckets of up to {builder.config.buckets[-1]} rows do not fit into the"
        f" device's memory ({free / 1e9:.1f} of {total / 1e9:.1f} GB are free: {describe(error)});"
        " use fewer --num-workers or a smaller --max-batch-size"
    )
