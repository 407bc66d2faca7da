"""What stands between mlcommons-loadgen and the connections: every query is answered once, whatever happens to it."""

import multiprocessing

import numpy as np
import pytest

from headrace.config import LoadConfig, TargetConfig
from headrace.referee.loadgen_sut import QuerySending
from headrace.target.counters import shared_words, words_of
from headrace.target.expected import Expected
from headrace.target.kept import KeptAnswers
from headrace.target.payloads import Place
from headrace.target.sending import GeneratorJob


class Completed(list):
    def __call__(self, ids):
        self.extend(ids)


@pytest.fixture
def completed():
    return Completed()


@pytest.fixture
def sending(tmp_path, completed):
    job = GeneratorJob(
        number=0,
        url="http://127.0.0.1:1",
        target=TargetConfig(url="http://127.0.0.1:1", model="m"),
        load=LoadConfig(kind="closed", concurrency=1, num_iters=10),
        bodies_path="",
        places=[Place(0, 1, 1)] * 3,
        expected=tmp_path,
        output=tmp_path,
        report=multiprocessing.Pipe()[0],
        counters=shared_words(1),
    )
    answers = KeptAnswers(Expected([{}] * 3, None, {}), lambda body, length: ())
    return QuerySending(job, answers, words_of(job.counters, 0), completed)


def begin(sending):
    return sending.begin(sending.next_due_ns())


def test_queries_are_due_as_soon_as_they_are_added(sending):
    assert sending.next_due_ns() is None
    sending.add(4, (70,))
    assert sending.next_due_ns() == 0
    number = begin(sending)
    assert sending.payload(number) == 1  # of three
    assert sending.next_due_ns() is None
    assert sending.recorder.scheduled[number] > 0


def test_all_samples_of_a_query_are_answered_together(sending, completed):
    sending.add(0, (1, 2, 3))
    sending.answered(begin(sending), 10, b"{}", None)
    assert completed == [1, 2, 3]


def test_it_has_finished_when_no_query_comes_and_all_are_answered(sending):
    sending.add(0, (1,))
    number = begin(sending)
    sending.end()
    assert not sending.finished(0)
    sending.failed(number, 5, "status 500")
    assert sending.finished(0)
    assert sending.payloads().tolist() == [0]
    assert sending.payloads().dtype == np.int32


def test_after_a_lost_request_everything_is_answered_once(sending, completed):
    for each in range(5):
        sending.add(each, (each,))
    first, second = begin(sending), begin(sending)
    sending.lost("no answer within 1 s")
    assert sorted(completed) == [0, 1, 2, 3, 4]
    sending.add(9, (9,))
    assert completed[-1] == 9
    sending.answered(second, 10, b"{}", None)
    assert len(completed) == 6
    assert sending.next_due_ns() is None
    assert sending.first_error == "no answer within 1 s"
    assert first == 0


def test_refusals_are_answers_for_loadgen_and_refusals_for_the_run(sending, completed):
    sending.add(0, (1,))
    number = begin(sending)
    sending.failed(number, 5, "status 503", shed=True)
    assert completed == [1]
    assert sending.recorder.status[number] == 4
