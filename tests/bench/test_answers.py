import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench.answers import Checker, exchange_warning, nearest_distinct, tolerance
from headrace.bench.summary import AnswerCheck, encode
from headrace.errors import WrongAnswers

REFERENCE = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
ROW_INDEX = np.array([[0, 1], [2, 3], [4, 5]])
BATCHES = np.array([0, 1, 2, 0])


def check(answers, batches, row_index, reference, tolerance):
    checker = Checker(row_index, reference, tolerance)
    return checker.add(answers, batches), checker.summary()


def right_answers() -> np.ndarray:
    return REFERENCE[ROW_INDEX[BATCHES]].copy()


@pytest.mark.parametrize(
    ("device", "precision", "compiled", "expected"),
    [
        ("cpu", "float32", False, 1e-4),
        ("cpu", "tf32", False, 1e-4),
        ("cpu", "float32", True, 1e-3),
        ("cuda", "float32", False, 1e-3),
        ("cuda", "float32", True, 1e-3),
        ("cuda", "tf32", False, 1e-2),
        ("cuda", "tf32", True, 1e-2),
        ("cuda", "bf16", True, 5e-2),
        ("cpu", "int8", False, 1e-1),
        ("cuda", "fp8", True, 2.5e-1),
    ],
)
def test_tolerance(device, precision, compiled, expected):
    assert tolerance(device, precision, compiled=compiled) == expected


def test_right_answers_pass():
    wrong, summary = check(right_answers(), BATCHES, ROW_INDEX, REFERENCE, 1e-4)
    assert wrong.tolist() == [False] * 4
    assert (summary.checked_rows, summary.wrong_rows, summary.max_error) == (8, 0, 0.0)


@pytest.mark.parametrize(
    ("change", "wrong_rows"),
    [
        pytest.param(lambda rows: rows[::-1], 2, id="two rows exchanged"),
        pytest.param(lambda rows: rows * [[1], [1.01]], 1, id="one row off by a hundredth"),
        pytest.param(lambda rows: rows * [[1], [math.nan]], 1, id="a row of NaN"),
        pytest.param(lambda rows: rows + np.eye(2, 5) * math.inf, 2, id="infinities, and NaN beside them"),
        pytest.param(lambda rows: rows * 0, 2, id="zeros"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_wrong_answer_is_seen_and_its_request_named(change, wrong_rows):
    answers = right_answers()
    answers[1] = change(answers[1])
    wrong, summary = check(answers, BATCHES, ROW_INDEX, REFERENCE, 1e-3)
    assert wrong.tolist() == [False, True, False, False]
    assert summary.wrong_rows == wrong_rows
    assert summary.max_error > 1e-3
    assert b"null" not in encode(summary)


@pytest.mark.parametrize(("factor", "is_wrong"), [(1.0009, False), (1.0011, True)])
def test_the_error_is_relative_to_the_references_norm(factor, is_wrong):
    wrong, summary = check(right_answers() * np.float32(factor), BATCHES, ROW_INDEX, REFERENCE, 1e-3)
    assert wrong.tolist() == [is_wrong] * 4
    assert summary.max_error == pytest.approx(factor - 1, rel=1e-3)


@pytest.mark.parametrize(
    ("answer", "is_wrong"), [(0.0, False), (1e-30, True), (math.nan, True)], ids=["zero", "not zero", "NaN"]
)
def test_where_zeros_are_expected_only_zeros_pass(answer, is_wrong):
    reference = np.zeros((1, 3), dtype=np.float32)
    answers = np.full((1, 1, 3), answer, dtype=np.float32)
    wrong, _ = check(answers, np.array([0]), np.array([[0]]), reference, 1e-2)
    assert wrong.tolist() == [is_wrong]


def test_a_reference_that_is_nan_lets_nothing_pass():
    reference = np.full((1, 3), math.nan, dtype=np.float32)
    wrong, summary = check(reference[None], np.array([0]), np.array([[0]]), reference, 1e-2)
    assert wrong.all()
    assert summary.nearest_distinct is None


@pytest.mark.parametrize("out", [(), (3,), (2, 3, 4)], ids=["a number", "a vector", "an image"])
def test_answers_of_any_shape_are_compared(out):
    reference = np.random.default_rng(1).standard_normal((4, *out)).astype(np.float32)
    answers = reference[None].copy()
    answers[0, 2] += 1
    wrong, summary = check(answers, np.array([0]), np.arange(4)[None], reference, 1e-3)
    assert (wrong.tolist(), summary.wrong_rows) == ([True], 1)


def test_no_answers_are_no_wrong_answers():
    wrong, summary = check(right_answers()[:0], BATCHES[:0], ROW_INDEX, REFERENCE, 1e-3)
    assert len(wrong) == summary.checked_rows == 0
    assert summary.max_error == 0.0


def test_answers_of_another_shape_are_refused():
    with pytest.raises(WrongAnswers, match=r"shape \[4\], the eager model's have \[5\]"):
        check(right_answers()[..., :4], BATCHES, ROW_INDEX, REFERENCE, 1e-3)


@given(st.integers(2, 20), st.integers(0, 1000))
def test_nearest_distinct_is_the_smallest_of_all_pairs(count, seed):
    rows = np.random.default_rng(seed).standard_normal((count, 3)).astype(np.float32)
    norms = [float(np.linalg.norm(row.astype(float))) for row in rows]
    pairs = [
        float(np.linalg.norm(rows[i].astype(float) - rows[j])) / max(norms[i], norms[j])
        for i in range(count)
        for j in range(i)
    ]
    assert nearest_distinct(rows) == pytest.approx(min(pairs))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([[1, 2]], None, id="one row"),
        pytest.param([[1, 2], [1, 2]], 0.0, id="equal rows"),
        pytest.param([[0, 0], [0, 0]], 0.0, id="zeros"),
        pytest.param([[0, 2], [0, 1]], 0.5, id="half"),
        pytest.param([[0, 2], [math.nan, 1], [0, 1]], 0.5, id="NaN is left out"),
    ],
)
def test_nearest_distinct(rows, expected):
    assert nearest_distinct(np.array(rows, dtype=np.float32)) == expected


@given(st.permutations(range(6)))
def test_what_passes_without_a_warning_cannot_be_an_exchanged_row(order):
    limit = nearest_distinct(REFERENCE) / 2.001
    answers = REFERENCE[list(order)][None]
    wrong, summary = check(answers, np.array([0]), np.arange(6)[None], REFERENCE, limit)
    assert exchange_warning(summary) is None
    assert summary.wrong_rows == sum(k != row for k, row in enumerate(order))
    assert wrong[0] == (summary.wrong_rows > 0)


@pytest.mark.parametrize(("nearest", "warned"), [(None, False), (0.021, False), (0.02, True), (0.0, True)], ids=str)
def test_a_tolerance_too_wide_to_see_an_exchange_is_warned_of(nearest, warned):
    summary = AnswerCheck(checked_rows=1, wrong_rows=0, tolerance=0.01, max_error=0.0, nearest_distinct=None)
    warning = exchange_warning(replace(summary, nearest_distinct=nearest))
    assert (warning is not None) == warned


def test_top1_agreement_is_the_share_of_rows_that_rank_the_same_class_first():
    reference = np.array([[1.0, 2.0, 0.0], [5.0, 2.0, 0.0]], dtype=np.float32)
    answers = np.array([[[0.9, 2.1, 0.0], [5.0, 6.0, 0.0]], [[4.0, 1.0, 0.0], [1.0, 3.0, 0.0]]], dtype=np.float32)
    rows = np.array([[0, 1], [1, 0]])
    batches = np.array([0, 1])
    assert check(answers, batches, rows, reference, 1e9)[1].top1_agreement == 0.75
    assert check(answers[:, :, 0], batches, rows, reference[:, 0], 1e9)[1].top1_agreement is None


def test_answers_compared_in_parts_are_summed_up_as_if_compared_at_once():
    answers = right_answers()
    answers[2, 0] += 1
    checker = Checker(ROW_INDEX, REFERENCE, 1e-4)
    flags = [*checker.add(answers[:1], BATCHES[:1]), *checker.add(answers[1:], BATCHES[1:])]
    wrong, summary = check(answers, BATCHES, ROW_INDEX, REFERENCE, 1e-4)
    assert flags == wrong.tolist() == [False, False, True, False]
    assert checker.summary() == summary
