"""Before the clock starts, in a process of its own: the checkpoint, and the eager model's answer to every distinct row.

The answers are made with the device and the precision of the run, but never compiled and by no design, so that a
design that mixes requests up, or a compiled model that computes something else, is seen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.bench import prepared
from headrace.bench.inputs import make_rows
from headrace.bench.jobs import PrepareJob
from headrace.bench.prepared import Prepared
from headrace.bench.reference import compute_reference
from headrace.files import whole_file
from headrace.model import precision
from headrace.model.checkpoint import ensure_checkpoint
from headrace.processes import become_child, failures_reported
from headrace.runtime.device import open_device


def run_prepare(job: PrepareJob) -> None:
    """Prepare, keep and report. The target of the process."""
    become_child()
    with failures_reported(job.report, "preparing the run failed"):
        job.report.send(_prepare(job))


def _prepare(job: PrepareJob) -> Prepared:
    notes: list[str] = []
    checkpoint = ensure_checkpoint(job.model, notes.append)
    path = checkpoint.path.absolute() if checkpoint else None
    precision.apply(job.model.precision)
    device = open_device(job.device)
    device.start()
    rows = make_rows(job.inputs, job.inputs.distinct_rows(job.num_requests))
    reference = job.folder.absolute() / f"{job.name}.npy"
    _save(reference, compute_reference(job.model, path, rows, device.torch_device))
    stat = path.stat() if path else None
    result = Prepared(
        reference=str(reference),
        checkpoint=str(path) if path else None,
        checkpoint_size=stat.st_size if stat else 0,
        checkpoint_mtime_ns=stat.st_mtime_ns if stat else 0,
        random_weights=bool(checkpoint and checkpoint.random),
        notes=tuple(notes),
    )
    prepared.store(job.folder, job.name, result)
    return result


def _save(path: Path, values: npt.NDArray[np.float32]) -> None:
    """Write whole or not at all: other runs of a sweep may look for it."""
    with whole_file(path, prepared.REMEDY) as partial:
        np.save(partial, values)
