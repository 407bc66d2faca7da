"""What is right: the expected outputs of each distinct payload, and how far an answer is from them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.bench.answers import exchange_warning, nearest_distinct
from headrace.bench.summary import AnswerCheck
from headrace.client.arrays import as_output
from headrace.wire.v2_call import Output

Array = npt.NDArray[Any]
# Largest relative L2 error of a right row, by the output's type. A server may batch a request with others, which sums
# in another order, and compute float32 in TF32 (2^-11 a product) or, behind a float32 output, in 16 bits (2^-8).
TOLERANCES = {"float64": 1e-6, "float32": 1e-2, "float16": 2e-2, "bfloat16": 5e-2}


@dataclass(slots=True)
class Tally:
    """What comparing has shown so far."""

    rows: int = 0
    wrong_rows: int = 0
    max_error: float = 0.0
    ranked: int = 0
    ranked_alike: int = 0

    def add(self, other: Tally, times: int = 1) -> None:
        self.rows += times * other.rows
        self.wrong_rows += times * other.wrong_rows
        self.max_error = max(self.max_error, other.max_error)
        self.ranked += times * other.ranked
        self.ranked_alike += times * other.ranked_alike


@dataclass(frozen=True, slots=True)
class Expected:
    """The right outputs of every distinct payload, by name; numbers as they are compared (bfloat16 widened)."""

    outputs: list[dict[str, Array]]
    tolerance: float | None = None  # in place of `TOLERANCES`
    dtypes: dict[str, str] = field(default_factory=dict)  # the server's, by output

    def compare(self, payload: int, answer: Iterable[Output]) -> Tally:
        """Compare an answer with the payload's; an output that is missing or of another shape is wrong in every row."""
        given = {output.name: output for output in answer}
        tally = Tally()
        for name, right in self.outputs[payload].items():
            output = given.get(name)
            if output is None or output.array.shape != right.shape:
                tally.add(Tally(rows=_rows(right), wrong_rows=_rows(right), max_error=sys.float_info.max))
            else:
                tally.add(_compared(as_output(output.array, output.dtype), right, self._allowed(output.dtype)))
        return tally

    def summary(self, tally: Tally) -> AnswerCheck:
        first = next(iter(self.outputs[0]), None)
        rows = [outputs[first] for outputs in self.outputs] if first is not None else []
        floats = [_flat(each).astype(np.float32) for each in rows if each.ndim and each.dtype.kind in "fiub"]
        alike = len({each.shape[1:] for each in floats}) == 1
        return AnswerCheck(
            checked_rows=tally.rows,
            wrong_rows=tally.wrong_rows,
            tolerance=max((self._allowed(dtype) for dtype in self.dtypes.values()), default=0.0),
            max_error=tally.max_error,
            nearest_distinct=nearest_distinct(np.concatenate(floats)) if alike else None,
            top1_agreement=tally.ranked_alike / tally.ranked if tally.ranked else None,
        )

    def _allowed(self, dtype: str) -> float:
        return TOLERANCES.get(dtype, 0.0) if self.tolerance is None else self.tolerance

    def save(self, path: Path) -> None:
        """Write for `load_expected` of another process."""
        arrays = {f"{number}/{name}": array for number, each in enumerate(self.outputs) for name, array in each.items()}
        np.savez(path, **arrays)  # type: ignore[arg-type]


def load_expected(path: Path, count: int, tolerance: float | None) -> Expected:
    """Read what `save` wrote of `count` payloads."""
    outputs: list[dict[str, Array]] = [{} for _ in range(count)]
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            number, _, name = key.partition("/")
            outputs[int(number)][name] = file[key]
    return Expected(outputs, tolerance)


def of_answer(answer: Iterable[Output]) -> dict[str, Array]:
    """Return an answer's outputs as they are compared."""
    return {output.name: as_output(output.array, output.dtype) for output in answer}


def of_file(arrays: Mapping[str, Array], count: int) -> list[dict[str, Array]]:
    """Return the right outputs that a file names, of `count` payloads."""
    return [{name: array[number] for name, array in arrays.items()} for number in range(count)]


def warning(check: AnswerCheck) -> str | None:
    return exchange_warning(check)


def _compared(answer: Array, right: Array, allowed: float) -> Tally:
    rows = _rows(right)
    if right.dtype.kind not in "fc":
        wrong = (_flat(answer) != _flat(right)).any(axis=1)
        return Tally(rows=rows, wrong_rows=int(wrong.sum()), max_error=float(wrong.any()))
    given, wanted = _flat(answer).astype(np.float64), _flat(right).astype(np.float64)
    with np.errstate(all="ignore"):
        off = np.linalg.norm(given - wanted, axis=1)
        errors = np.where(off == 0.0, 0.0, off / np.linalg.norm(wanted, axis=1))
    errors = np.nan_to_num(errors, nan=sys.float_info.max, posinf=sys.float_info.max)
    tally = Tally(rows=rows, wrong_rows=int((errors > allowed).sum()), max_error=float(errors.max(initial=0.0)))
    if right.ndim == 2 and right.shape[1] > 1:
        tally.ranked = rows
        tally.ranked_alike = int((answer.argmax(axis=1) == right.argmax(axis=1)).sum())
    return tally


def _rows(array: Array) -> int:
    return len(array) if array.ndim else 1


def _flat(array: Array) -> Array:
    return array.reshape(_rows(array), -1)
