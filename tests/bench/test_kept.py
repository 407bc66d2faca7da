"""Answers are checked, each once, whether they are kept to the end or compared as they come."""

import numpy as np
import pytest

from headrace.bench import kept
from headrace.bench.answers import Checker
from headrace.bench.kept import UNKNOWN, KeptAnswers
from headrace.bench.record import STATUSES, empty_records

REFERENCE = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
ROW_INDEX = np.array([[0, 1], [2, 3]])
OK, WRONG = STATUSES.index("ok"), STATUSES.index("wrong")


@pytest.fixture(params=["kept", "compared as they come"])
def answers(request, monkeypatch):
    if request.param != "kept":
        monkeypatch.setattr(kept, "SHARE_OF_MEMORY", 0.0)
    records = empty_records(6)
    records["batch"] = np.arange(6) % 2
    records["status"][:4] = OK
    return records, KeptAnswers(records, Checker(ROW_INDEX, REFERENCE, 1e-4))


def right(indexes):
    return REFERENCE[ROW_INDEX[np.asarray(indexes) % 2]]


def test_a_wrong_answer_is_marked_and_counted(answers):
    records, given = answers
    bad = right([2])
    bad[0, 1, 3] += 1
    given.add(np.array([0, 1]), right([0, 1]))
    given.add(np.array([2]), bad)
    given.add(np.array([3]), right([3]))
    check = given.finish(4)
    assert (check.checked_rows, check.wrong_rows) == (8, 1)
    assert records["status"].tolist() == [OK, OK, WRONG, OK, 0, 0]


def test_an_answer_that_comes_before_its_sender_said_what_it_sent_is_checked_all_the_same(answers):
    records, given = answers
    records["batch"][1] = UNKNOWN
    given.add(np.array([0, 1]), right([0, 0]))  # request 1 got the other batch's answer
    records["batch"][1] = 1
    given.add(np.array([2, 3]), right([2, 3]))
    assert given.finish(4).wrong_rows == 2
    assert records["status"].tolist() == [OK, WRONG, OK, OK, 0, 0]


def test_without_an_answer_there_is_nothing_to_say(answers):
    assert answers[1].finish(0) is None


def test_answers_are_kept_if_that_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(kept, "SHARE_OF_MEMORY", 0.0)
    records = empty_records(2)
    records["status"] = OK
    records["batch"] = 0
    given = KeptAnswers(records, Checker(ROW_INDEX, REFERENCE, 1e-4), keep_all=True)
    given.add(np.array([0, 1]), right([0, 0]))
    given.finish(2)
    given.save(tmp_path / "answers.npy", 2)
    assert (np.load(tmp_path / "answers.npy") == right([0, 0])).all()
