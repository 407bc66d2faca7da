"""What every server script is told, as JSON in one environment variable: servers start processes in many ways."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

VARIABLE = "SERVER_SETTINGS"
ROW_SHAPE = (3, 250, 250)
ROW_BYTES = 4 * 3 * 250 * 250  # float32
OUTPUTS = 1000  # float32 numbers for each row


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server serves the model; one that has no such knob leaves it out."""

    port: int
    model: str  # resnet18 or tiny
    folder: str  # where the checkpoint and the inputs lie
    info_folder: str  # each process that holds a model writes there what it made of it
    device: str  # cpu or cuda
    precision: str  # float32, tf32, bf16 or fp16
    compile: bool
    compile_mode: str
    buckets: tuple[int, ...]  # batch sizes that are warmed; batches are padded to the next of them
    workers: int  # processes, or lanes, that compute
    frontends: int  # processes that speak HTTP
    delay_ms: float  # how long a batch may wait to grow
    engines: int = 1  # of `workers` each: one on every GPU, or so many on the CPU

    @property
    def max_batch_size(self) -> int:
        """Rows of the largest batch."""
        return self.buckets[-1]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def from_environment() -> Settings:
    """Return what the driver said. Raises KeyError where there was none: scripts are started by the driver."""
    given = json.loads(os.environ[VARIABLE])
    return Settings(**given | {"buckets": tuple(given["buckets"])})
