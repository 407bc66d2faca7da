"""mlcommons-loadgen's files, as version 6.0.17 wrote them in short tests."""

from pathlib import Path

import numpy as np
import pytest

from headrace.errors import RunFailed
from headrace.referee.loadgen_log import printed, read_results, read_trace

DATA = Path(__file__).parent / "data"


def results(scenario):
    with (DATA / f"detail-{scenario}.txt").open() as lines:
        return read_results(lines)


def trace(scenario, samples):
    with (DATA / f"trace-{scenario}.json").open() as lines:
        return read_trace(lines, samples)


@pytest.mark.parametrize(
    ("scenario", "throughput", "p50", "p99", "mean"),
    [
        ("SingleStream", 101.36, 0.006511482, 0.138555030, 0.009666932),
        ("MultiStream", None, 0.005210712, 0.067375882, 0.007831458),
        ("Server", 46.6247, 0.005650068, 0.027656731, 0.007117239),
        ("Offline", 7197.13, 0.007641938, 0.007641938, 0.007641938),
    ],
)
def test_what_it_prints_is_read(scenario, throughput, p50, p99, mean):
    told = printed(results(scenario))
    assert told.throughput == throughput
    assert (told.p50, told.p99, told.mean) == pytest.approx((p50, p99, mean), abs=1e-12)


def test_lines_that_are_no_entries_are_left_out():
    lines = ["something else\n", ':::MLLOG {"key": ""broken""}\n', ':::MLLOG {"key": "a", "value": 2, "more": {}}\n']
    assert read_results(lines) == {"a": 2}


def test_moments_of_requests_are_read_from_the_trace():
    requests = trace("Server", 1)
    assert len(requests.scheduled) == 12
    assert requests.scheduled[:2].tolist() == [96_184, 18_067_391]
    assert (requests.issued - requests.scheduled)[:2].tolist() == [161, 22_392_677]
    assert (requests.completed - requests.scheduled)[:2].tolist() == [5_228_116, 27_656_731]
    assert (np.diff(requests.scheduled) > 0).all()


def test_the_samples_of_a_query_are_one_request():
    one_by_one, queries = trace("MultiStream", 1), trace("MultiStream", 4)
    assert len(one_by_one.issued) == 14
    assert len(queries.issued) == 4
    assert queries.samples == 4
    assert queries.completed.tolist() == one_by_one.completed[::4].tolist()


def test_a_trace_without_samples_is_no_result():
    with pytest.raises(RunFailed, match="ended before the first answer"):
        read_trace(['{"traceEvents":[\n', '{"name":"Wait","ph":"X"}\n'], 1)
