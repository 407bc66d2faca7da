"""Are the answers the model's? Every row of every answer against the eager model's answer to the same row."""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt

from headrace.bench.summary import AnswerCheck
from headrace.config import Precision
from headrace.errors import WrongAnswers

# Seen on an H100 with ResNet-18, random weights: fp16 1.6e-3, bf16 1.3e-2 at most. In 8 bits, 24 layers in a row, as
# those of ViT-B, with two independent roundings each (2^-7 in int8, 2^-5 in fp8: see `model.optimise.tolerance`) come
# to 5.4e-2 and 0.22 on top of bf16's.
COMPUTE_TOLERANCES: dict[Precision, float] = {"fp16": 1e-2, "bf16": 5e-2, "int8": 1e-1, "fp8": 2.5e-1}
MOST_COMPARED_ROWS = 512  # pairwise: 131,000 distances

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def tolerance(device_type: str, precision: Precision, *, compiled: bool) -> float:
    """Return the largest relative L2 error of a right answer.

    Each product of float32 is rounded by up to 2^-24 = 6e-8, of TF32 by up to 2^-11 = 5e-4, and batches of
    another size, or compiled code, sum in another order. Seen on a CPU: answers of 28 torchvision models with
    random weights are within 7e-6 of float64's. CUDA gets more room than the CPU, since its convolutions may
    run as Winograd transforms, and compiled code because it computes batch norms otherwise. An exchanged row
    differs by far more, which `nearest_distinct` verifies in every run.
    """
    if precision in COMPUTE_TOLERANCES:
        return COMPUTE_TOLERANCES[precision]
    if device_type == "cuda":
        return 1e-2 if precision == "tf32" else 1e-3
    return 1e-3 if compiled else 1e-4


class Checker:
    """Compares answers with the eager model's to the same rows, some at a time.

    Shapes: row_index [batches, batch_size] points into reference [distinct, *out].
    """

    def __init__(self, row_index: Indices, reference: Floats, tolerance: float) -> None:
        self._row_index = row_index
        self._reference = reference
        self._expected = _flat(reference)
        self._tolerance = tolerance
        self._checked = self._wrong = self._ranked = self._ranked_alike = 0
        self._max_error = 0.0

    def add(self, answers: npt.NDArray[np.generic], batch_of_request: Indices) -> Flags:
        """Return which of the answers [requests, batch_size, *out] hold a wrong row.

        A row with a NaN or an infinity is wrong. Raises WrongAnswers if the answers' shape is not the reference's.
        """
        if answers.shape[2:] != self._reference.shape[1:]:
            raise WrongAnswers(
                f"the server's answers to a row have shape {list(answers.shape[2:])}, the eager model's have"
                f" {list(self._reference.shape[1:])}; the model must answer every row by itself"
            )
        rows = self._row_index[batch_of_request]
        errors = np.empty(answers.shape[:2])
        for request, expected in enumerate(rows):  # one at a time: float64 copies of all would not fit
            errors[request] = relative_errors(_flat(answers[request]), self._expected[expected])
        wrong = errors > self._tolerance
        self._checked += errors.size
        self._wrong += int(wrong.sum())
        self._max_error = max(self._max_error, float(errors.max(initial=0.0)))
        if answers.ndim == 3 and answers.shape[2] > 1:
            self._ranked += errors.size
            alike = answers.argmax(axis=2) == self._reference.argmax(axis=1)[rows]
            self._ranked_alike += int(alike.sum())
        wrong_requests: Flags = np.any(wrong, axis=1)
        return wrong_requests

    def summary(self) -> AnswerCheck:
        return AnswerCheck(
            checked_rows=self._checked,
            wrong_rows=self._wrong,
            tolerance=self._tolerance,
            max_error=self._max_error,
            nearest_distinct=nearest_distinct(self._reference),
            top1_agreement=self._ranked_alike / self._ranked if self._ranked else None,
        )


def relative_errors(answers: Doubles, expected: Doubles) -> Doubles:
    """Return ||answer - expected|| / ||expected|| per row, [rows].

    What is no number, and any answer but 0 where 0 is expected, counts as the largest float: it never passes,
    and unlike an infinity it can be written to JSON.
    """
    with np.errstate(all="ignore"):
        error = np.linalg.norm(answers - expected, axis=1)
        relative = np.where(error == 0.0, 0.0, error / np.linalg.norm(expected, axis=1))
    largest = sys.float_info.max
    return np.nan_to_num(relative, nan=largest, posinf=largest)


def nearest_distinct(reference: Floats) -> float | None:
    """Return the relative L2 distance of the two most alike of the first 512 answers; None with one.

    Relative to the larger norm of the two, so that it is the smallest error that an exchanged pair can show.
    Answers that are not finite are left out, since no answer passes for them.
    """
    rows = _flat(reference[:MOST_COMPARED_ROWS])
    rows = rows[np.isfinite(rows).all(axis=1)]
    if len(rows) < 2:
        return None
    return min(_nearest_to_first(rows[i:]) for i in range(len(rows) - 1))


def exchange_warning(summary: AnswerCheck) -> str | None:
    """Return a warning if an exchanged row could pass for right, else None."""
    nearest = summary.nearest_distinct
    if nearest is None or summary.tolerance < nearest / 2:
        return None
    return (
        f"two different inputs have answers only {nearest:.1e} apart (relative), and errors up to"
        f" {summary.tolerance:.0e} count as right: an exchanged row could go unnoticed;"
        " use trained weights, --precision float32 or fewer --distinct-images"
    )


def _nearest_to_first(rows: Doubles) -> float:
    distances = np.linalg.norm(rows[1:] - rows[0], axis=1)
    norms = np.linalg.norm(rows, axis=1)
    larger = np.maximum(norms[1:], norms[0])
    return float((distances / np.where(larger == 0.0, 1.0, larger)).min())


def _flat(rows: npt.NDArray[np.generic]) -> Doubles:
    return rows.reshape(len(rows), -1).astype(np.float64)
