"""Photographs with the labels that a server gave them: a run like any other, whose answers are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.config import DesignConfig, InputConfig, LoadConfig, ModelConfig, RunConfig

TOP = 3
IMAGE_SIZE = 224  # what the model was trained on


@dataclass(frozen=True, slots=True)
class Label:
    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Labelled:
    """A photograph and its likeliest labels, best first."""

    photograph: Path
    labels: tuple[Label, ...]


def classify_config(photographs: Sequence[Path], device: str, design: DesignConfig) -> RunConfig:
    """Return a run that sends every photograph once, alone in its request, after a first request with the first one."""
    return RunConfig(
        device=device,
        model=ModelConfig(name="efficientnet_lite0"),
        design=design,
        inputs=InputConfig(files=tuple(photographs), batch_size=1, image_size=IMAGE_SIZE),
        load=LoadConfig(num_iters=len(photographs), warmup_iters=len(photographs) - 1, keep_answers=True),
    )


def read_labels(photographs: Sequence[Path], answers: npt.NDArray[np.float32], names: Sequence[str]) -> list[Labelled]:
    """Return labels from the measured answers, [requests, 1, classes] of logits, the last `len(photographs)` of them.

    Requests take turns with the photographs, so the first phases used up one whole turn.
    """
    measured = answers[-len(photographs) :, 0].astype(np.float64)
    weights = np.exp(measured - measured.max(axis=1, keepdims=True))
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    return [Labelled(photograph, _best(row, names)) for photograph, row in zip(photographs, probabilities, strict=True)]


def _best(probabilities: npt.NDArray[np.float64], names: Sequence[str]) -> tuple[Label, ...]:
    best = np.argsort(probabilities)[::-1][:TOP]
    return tuple(Label(names[index], float(probabilities[index])) for index in best)
