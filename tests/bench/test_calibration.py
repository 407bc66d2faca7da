"""A calibration is kept per machine, found again, and speaks of payloads between those that were measured."""

from dataclasses import replace
from pathlib import Path

import pytest

from headrace.bench import calibration
from headrace.errors import OutputError
from tests.bench.test_validity import CALIBRATION


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "state/headrace/calibration-m.json"
    calibration.save(CALIBRATION, path)
    assert calibration.load(path) == CALIBRATION
    assert list(path.parent.iterdir()) == [path]


def test_no_file_is_no_calibration_and_another_file_is_an_error(tmp_path):
    assert calibration.load(tmp_path / "none.json") is None
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(OutputError, match="calibrate again"):
        calibration.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"XDG_STATE_HOME": "/state", "HOME": "/home/me"}, "/state/headrace"),
        ({"HOME": "/home/me"}, "/home/me/.local/state/headrace"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.local/state/headrace"),
    ],
)
def test_it_lies_where_the_user_keeps_state(environ, folder):
    assert calibration.default_path("abc", environ) == Path(folder) / "calibration-abc.json"


def test_machines_are_told_apart_by_processor_and_count():
    keys = {calibration.machine_key(*each) for each in (("one", 2), ("one", 4), ("two", 2))}
    assert len(keys) == 3
    assert calibration.machine_key("one", 2) in keys


@pytest.mark.parametrize(
    ("payload_bytes", "rate", "p99_s"),
    [
        (10, 10_000, 2e-4),
        (1000, 10_000, 2e-4),
        (500_500, 1818.18, 1.1e-3),
        (1_000_000, 1000, 2e-3),
        (1_999_000, 526.3, 3.8e-3),
    ],
)
def test_time_grows_with_the_payload_along_lines(payload_bytes, rate, p99_s):
    found = CALIBRATION.ceiling(payload_bytes)
    assert found.requests_per_s == pytest.approx(rate, rel=1e-3)
    assert found.p99_s == pytest.approx(p99_s, rel=1e-3)


def test_a_calibration_of_a_busy_machine_says_so():
    assert CALIBRATION.warning is None
    busy = replace(CALIBRATION, slip=replace(CALIBRATION.slip, p99=0.0012))
    assert "sent up to 1,200 us late" in busy.warning


def test_one_size_holds_for_all():
    one = replace(CALIBRATION, ceilings=CALIBRATION.ceilings[:1])
    assert one.ceiling(10**9).requests_per_s == 10_000
