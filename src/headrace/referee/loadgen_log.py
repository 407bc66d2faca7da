"""What mlcommons-loadgen writes: its log of results, and its trace, which has the moments of every sample.

Source: MLPerf LoadGen, loadgen/results.cc (keys of mlperf_log_detail.txt) and loadgen/loadgen.cc (trace events
"Sample": ts is when it was scheduled, in microseconds; issue_start_ns and complete_ns count from there).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np

from headrace.errors import RunFailed
from headrace.referee.found import Printed, Requests

_MARK = ":::MLLOG "
_SAMPLE = re.compile(r'"name":"Sample",.*"ph":\s*"b"')
_RATES = ("result_completed_samples_per_sec", "result_samples_per_second", "result_qps_with_loadgen_overhead")
NS_PER_US = 1_000


class _Entry(msgspec.Struct):
    key: str
    value: Any


class _Moments(msgspec.Struct):
    sample_seq: int
    query_seq: int
    issue_start_ns: int
    complete_ns: int


class _Sample(msgspec.Struct):
    ts: float
    args: _Moments


def read_results(lines: Iterable[str]) -> dict[str, Any]:
    """Return the values of mlperf_log_detail.txt by key; the last one where a key comes again.

    Lines that are no entries are left out: texts in it are not always escaped.
    """
    entries: dict[str, Any] = {}
    decode = msgspec.json.Decoder(_Entry).decode
    for line in lines:
        if not line.startswith(_MARK):
            continue
        try:
            entry = decode(line[len(_MARK) :])
        except msgspec.DecodeError:
            continue
        entries[entry.key] = entry.value
    return entries


def printed(results: Mapping[str, Any]) -> Printed:
    """Return what loadgen says itself. Its mean has been wrong by an overflow: compare it, and use it for nothing."""

    def seconds(name: str) -> float | None:
        value = results.get(f"result_{name}_latency_ns")
        return None if value is None else float(value) / 1e9

    rate = next((results[key] for key in _RATES if key in results), None)
    return Printed(
        throughput=None if rate is None else float(rate),
        p50=seconds("50.00_percentile"),
        p90=seconds("90.00_percentile"),
        p99=seconds("99.00_percentile"),
        mean=seconds("mean"),
    )


def read_trace(lines: Iterable[str], samples: int) -> Requests:
    """Return the requests of mlperf_log_trace.json, in the order in which they were handed over. Raises RunFailed.

    With `samples` 1 each sample is a request, also those of Offline's only query; else a query is one.
    """
    decode = msgspec.json.Decoder(_Sample).decode
    found = [decode(line.rstrip().rstrip(",")) for line in lines if _SAMPLE.search(line)]
    if not found:
        raise RunFailed("mlcommons-loadgen's trace holds no sample: it ended before the first answer")
    rows = np.asarray(
        [
            (each.args.sample_seq, each.args.query_seq, round(each.ts * NS_PER_US), *_moments(each.args))
            for each in found
        ],
        dtype=np.int64,
    )
    rows = rows[np.argsort(rows[:, 0])]
    if samples > 1:
        rows = rows[np.unique(rows[:, 1], return_index=True)[1]]
    scheduled = rows[:, 2]
    return Requests(scheduled + rows[:, 3], scheduled + rows[:, 4], scheduled, samples)


def _moments(sample: _Moments) -> tuple[int, int]:
    return sample.issue_start_ns, sample.complete_ns
