"""perf_analyzer's files, as version 2.48.0 wrote them in a short run, and the command lines that it gets."""

import stat
from pathlib import Path

import numpy as np
import pytest

from headrace.config import LoadConfig, TargetConfig
from headrace.errors import InvalidOption, RunFailed
from headrace.referee import perf_analyzer
from headrace.referee.perf_analyzer import (
    Asked,
    PerfAnalyzer,
    find,
    intervals_us,
    measure,
    options,
    read_csv,
    read_export,
)

DATA = Path(__file__).parent / "data"
CLOSED = LoadConfig(kind="closed", concurrency=4, duration_s=3)
NS_PER_US = 1_000


def asked(load=CLOSED, **more):
    target = TargetConfig(url="http://127.0.0.1:8000", model="net", **more.pop("target", {}))
    usual = {"samples": 1, "duration_s": 3.6, "payload_bytes": 1024, "requests": 100}
    return Asked(url=target.url, target=target, load=load, **(usual | more))


def test_its_report_is_read():
    told = read_csv((DATA / "perf_analyzer.csv").read_text())
    assert told.throughput == 19.3886
    assert (told.p50, told.p90, told.p99, told.mean) == pytest.approx((0.00234, 0.002546, 0.002821, 0.002389))


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "Inferences/Second\n"])
def test_a_report_that_is_none_is_said(text):
    with pytest.raises(RunFailed, match="report cannot be read"):
        read_csv(text)


def test_its_export_is_read_although_it_is_not_utf8():
    data = (DATA / "perf_analyzer.json").read_bytes()
    with pytest.raises(UnicodeDecodeError):
        data.decode()
    requests = read_export(data, 1)
    latencies_ms = (requests.completed - requests.issued) / 1e6
    assert len(latencies_ms) == 21
    assert requests.scheduled is None
    assert (np.diff(requests.issued) > 0).all()
    assert latencies_ms.mean() == pytest.approx(2.389, abs=0.001)  # as it prints


def test_an_export_that_is_none_is_said():
    with pytest.raises(RunFailed, match="export cannot be read"):
        read_export(b'{"experiments": 3}', 1)


def test_a_closed_loop_becomes_a_concurrency(tmp_path):
    given = options(asked(samples=8), None, tmp_path)
    assert given[:9] == ["-m", "net", "-u", "127.0.0.1:8000", "-i", "http", "-b", "8", "--async"]
    assert given[given.index("--concurrency-range") + 1] == "4"
    assert given[given.index("--measurement-interval") + 1] == "1000"  # three windows, each longer than told


def test_a_plan_becomes_a_file_of_intervals(tmp_path):
    given = options(asked(wait=True), [0, 10_000_000, 10_500_000], tmp_path)
    assert "--sync" in given
    assert "--async" not in given
    assert given[given.index("--request-intervals") + 1] == "intervals.txt"
    assert (tmp_path / "intervals.txt").read_text() == "1\n10000\n500\n"


def test_intervals_do_not_drift_from_the_plan():
    offsets = np.cumsum(np.full(10_000, 1_400)).tolist()  # 1.4 us: each gap rounded by itself would lose 0.4
    moments = np.cumsum(intervals_us(offsets))
    planned = (np.asarray(offsets) - offsets[0]) / NS_PER_US
    assert np.abs(moments - 1 - planned).max() <= 1


def test_shape_and_version_go_along(tmp_path):
    target = {"shapes": {"x": (1, 3, 224)}, "version": "2"}
    given = options(asked(target=target), None, tmp_path)
    assert given[given.index("--shape") + 1] == "x:3,224"
    assert given[given.index("-x") + 1] == "2"


def test_requests_are_not_exported_where_that_would_fill_the_disk(tmp_path):
    for large in (asked(payload_bytes=750_000, requests=1_000), asked(payload_bytes=0, requests=100_000)):
        assert "--profile-export-file" not in options(large, None, tmp_path)
    assert "--profile-export-file" in options(asked(), None, tmp_path)


def test_what_is_missing_is_said_with_the_remedy(tmp_path):
    with pytest.raises(InvalidOption, match=r"is not at .*pip install .*tritonclient==2.48.0.*libb64-0d"):
        find(tmp_path / "perf_analyzer")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_one_that_cannot_run_is_said_with_its_reason(tmp_path):
    broken = script(tmp_path / "perf_analyzer", "echo libb64.so.0d: cannot open shared object >&2; exit 127")
    with pytest.raises(InvalidOption, match=r"cannot run \(libb64.*apt-get install"):
        find(broken)


def test_its_version_and_libraries_are_found(tmp_path):
    binary = script(tmp_path / "bin/perf_analyzer", 'echo "Perf Analyzer Version 2.48.0 ($LD_LIBRARY_PATH)" >&2')
    libraries = tmp_path / "nvidia/cuda_runtime/lib"
    libraries.mkdir(parents=True)
    found = find(binary)
    assert found.version == "2.48.0"
    assert str(libraries) in perf_analyzer._environ(found.binary)["LD_LIBRARY_PATH"]


def test_failing_is_told_with_its_last_words(tmp_path):
    binary = script(tmp_path / "perf_analyzer", "echo warn; echo warn; echo failed to get model metadata; exit 9")
    found = measure("pa", PerfAnalyzer(binary, "1"), asked(), None, tmp_path / "out")
    assert found.error == "perf_analyzer ended with 9 and without a report: failed to get model metadata"
    assert (tmp_path / "out/log.txt").read_text() == "warn\nfailed to get model metadata\n"


def test_what_it_printed_and_what_it_recorded_stand_side_by_side(tmp_path):
    text = f"cp {DATA}/perf_analyzer.csv report.csv; cp {DATA}/perf_analyzer.json export.json"
    found = measure("pa", PerfAnalyzer(script(tmp_path / "pa", text), "1"), asked(), None, tmp_path / "out")
    assert found.error is None
    assert found.requests == 21
    assert found.from_schedule is None
    assert found.from_send.p50 == pytest.approx(found.printed.p50, abs=2e-6)
    assert not (tmp_path / "out/export.json").exists()
    assert (tmp_path / "out/requests.parquet").exists()
