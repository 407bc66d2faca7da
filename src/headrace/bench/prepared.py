"""What a run prepares once and may take over from another run: found again by all that decides it. No torch here."""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from headrace.config import InputConfig, ModelConfig
from headrace.files import write_whole

REMEDY = "free space or name another folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The checkpoint, and the eager model's answer to every distinct row."""

    reference: str  # .npy, float32 [distinct rows, *features]
    checkpoint: str | None
    checkpoint_size: int = 0  # bytes, and time of change: another file under the same name is another model
    checkpoint_mtime_ns: int = 0
    random_weights: bool = False
    notes: tuple[str, ...] = ()  # what the user should hear


def key(model: ModelConfig, inputs: InputConfig, num_requests: int, device: str) -> str:
    """Name what was prepared by the options that decide it."""
    decided_by = (
        replace(model, compile=False, compile_cache=None),
        inputs.distinct_rows(num_requests),
        (inputs.kind, inputs.wire, inputs.files, inputs.image_size, inputs.seed),
        device,
        [importlib.metadata.version(package) for package in ("torch", "torchvision")],
    )
    return "prepared-" + hashlib.sha256(repr(decided_by).encode()).hexdigest()[:16]


def find(folder: Path, name: str) -> Prepared | None:
    """Return what was prepared under `name`, if it is still all there and unchanged."""
    try:
        prepared = msgspec.json.decode((folder / f"{name}.json").read_bytes(), type=Prepared)
    except (OSError, msgspec.MsgspecError):
        return None
    if not Path(prepared.reference).exists():
        return None
    return prepared if _same_checkpoint(prepared) else None


def store(folder: Path, name: str, prepared: Prepared) -> None:
    """Keep `prepared` for `find`. Raises OutputError."""
    write_whole(folder / f"{name}.json", msgspec.json.encode(prepared), REMEDY)


def _same_checkpoint(prepared: Prepared) -> bool:
    if prepared.checkpoint is None:
        return True
    try:
        stat = Path(prepared.checkpoint).stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (prepared.checkpoint_size, prepared.checkpoint_mtime_ns)
