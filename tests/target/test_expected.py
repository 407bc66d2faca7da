"""An answer is right within what its type allows, whatever it is made of; equal answers are compared once."""

import msgspec
import numpy as np
import pytest

from headrace.errors import TransportFailed
from headrace.target import kept
from headrace.target.expected import Expected, load_expected, of_answer
from headrace.target.kept import KeptAnswers
from headrace.wire.v2_call import Output, decode_answer


def answer(values, dtype="float32", name="y"):
    return (Output(name, dtype, np.asarray(values)),)


RIGHT = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)


@pytest.mark.parametrize(
    ("given", "wrong_rows"),
    [
        (RIGHT, 0),
        (RIGHT * 1.005, 0),
        (RIGHT * 1.02, 2),
        (RIGHT[::-1], 2),
        (np.where(RIGHT == 5, np.nan, RIGHT), 1),
        (np.where(RIGHT == 5, np.inf, RIGHT), 1),
        (RIGHT[:1], 2),
        (RIGHT.T, 2),
    ],
)
def test_float_rows_have_a_tolerance(given, wrong_rows):
    tally = Expected([{"y": RIGHT}]).compare(0, answer(given.astype(np.float32)))
    assert (tally.rows, tally.wrong_rows) == (2, wrong_rows)


def test_the_tolerance_may_be_given():
    assert Expected([{"y": RIGHT}], tolerance=1e-3).compare(0, answer(RIGHT * 1.005)).wrong_rows == 2


def test_whole_numbers_are_exact():
    right = np.array([1, 2, 3])
    assert Expected([{"y": right}], tolerance=0.5).compare(0, answer([1, 2, 4], "int64")).wrong_rows == 1


def test_bfloat16_is_compared_as_numbers():
    bits = np.array([[0x3F80, 0x4000]], dtype=np.uint16)
    right = of_answer(answer(bits, "bfloat16"))
    assert right["y"].tolist() == [[1.0, 2.0]]
    assert Expected([right]).compare(0, answer(bits, "bfloat16")).wrong_rows == 0


def test_a_missing_output_is_wrong_in_every_row():
    assert Expected([{"y": RIGHT}]).compare(0, answer(RIGHT, name="z")).wrong_rows == 2


def test_classes_are_ranked():
    close = RIGHT.copy()
    close[0] = [1, 3.0, 2.999]
    tally = Expected([{"y": RIGHT}], tolerance=1.0).compare(0, answer(close))
    assert (tally.ranked, tally.ranked_alike) == (2, 1)


def test_what_is_saved_is_loaded(tmp_path):
    Expected([{"a/b": RIGHT}, {"a/b": RIGHT + 1}]).save(tmp_path / "x.npz")
    loaded = load_expected(tmp_path / "x.npz", 2, 0.5)
    assert [each["a/b"].tolist() for each in loaded.outputs] == [RIGHT.tolist(), (RIGHT + 1).tolist()]


def body(values, name="y", id_="1"):
    array = np.asarray(values, np.float32)
    output = {"name": name, "datatype": "FP32", "shape": list(array.shape)}
    output["parameters"] = {"binary_data_size": array.nbytes}
    head = msgspec.json.encode({"id": id_, "outputs": [output]})
    return head + array.tobytes(), len(head)


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, given, header_bytes):
        self.calls += 1
        return decode_answer(given, header_bytes)


def test_equal_answers_are_compared_once_and_counted_as_often_as_they_came():
    decode = Counting()
    answers = KeptAnswers(Expected([{"y": RIGHT}, {"y": RIGHT + 1}]), decode)
    came = [answers.add(0, *body(RIGHT, id_=str(number))) for number in range(5)]
    came += [answers.add(1, *body(RIGHT)), answers.add(1, *body(RIGHT + 1))]
    assert decode.calls == 0
    wrong, tally = answers.finish(np.array(came, dtype=np.int32))
    assert decode.calls == 3
    assert wrong.tolist() == [False] * 5 + [True, False]
    assert (tally.rows, tally.wrong_rows) == (14, 2)


def test_answers_beyond_the_room_are_compared_at_once(monkeypatch):
    monkeypatch.setattr(kept, "MOST_BYTES", 0)
    answers = KeptAnswers(Expected([{"y": RIGHT}]), decode_answer)
    came = [answers.add(0, *body(RIGHT)), answers.add(0, *body(RIGHT * 2)), answers.add(0, *body(RIGHT * 1.001))]
    assert answers.compared_at_once == 2
    wrong, tally = answers.finish(np.array(came, dtype=np.int32))
    assert wrong.tolist() == [False, True, False]
    assert tally.wrong_rows == 2


def test_what_is_no_answer_is_wrong():
    def decode(given, header_bytes):
        raise TransportFailed("no")

    answers = KeptAnswers(Expected([{"y": RIGHT}]), decode)
    wrong, tally = answers.finish(np.array([answers.add(0, b"x", None)], dtype=np.int32))
    assert wrong.tolist() == [True]
    assert tally.wrong_rows == 2
