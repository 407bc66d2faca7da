"""What Prometheus and perf_analyzer read: checked with Prometheus's own parser, and against what was counted."""

import asyncio
import math
import re
import threading
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from headrace.control import VersionStatus
from headrace.frontend import metrics
from headrace.frontend.board import Board
from headrace.frontend.gpu import GpuReading, GpuWatch, read_gpu
from headrace.transport.descriptors import ANSWER, Descriptor

GPU = GpuReading(
    uuid="GPU-1",
    name="H100",
    utilization_pct=75.0,
    memory_used_bytes=61_234_567_890,
    memory_total_bytes=80_000_000_000,
    power_w=350.5,
    power_limit_w=700.0,
    temperature_c=41,
)


def answered(row, took_us, rows, batch_rows, times=1):
    """Count requests of which 3/10 was waiting and 6/10 computing."""
    ns = took_us * 1000
    for _ in range(times):
        marks = (ns // 20, ns * 7 // 20, ns * 19 // 20, ns)
        row.succeeded(0, ns, rows, Descriptor(1, ANSWER, 0, rows, 1, batch_rows, 0, *marks))


@pytest.fixture
def board():
    return Board.private()


@pytest.fixture
def row(board):
    return board.row(0, board.slot("m", "1"))


def render(models, ready, gpus, up_s, versions=()):
    return metrics.render(models, metrics.Now(ready=ready, gpus=gpus, started_ago_s=up_s, versions=versions))


def samples(board, ready=None, gpu=None):
    """Return all samples as {(name, labels but for the model's): value}, read by Prometheus's parser."""
    text = render(board.totals(), ready or {}, [gpu] if gpu else [], 12.5).decode()
    told = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k not in {"model", "version"})
            name = written(sample.name, text)
            assert (name, labels) not in told
            told[name, labels] = sample.value
    return told


def written(name, text):
    """Return a name as the text has it: the parser gives every counter the ending that the newer format asks for."""
    return name if re.search(rf"^{name}[ {{]", text, re.MULTILINE) else name.removesuffix("_total")


def test_requests_rows_batches_and_times_have_tritons_names(board, row):
    answered(row, 1000, rows=2, batch_rows=4, times=6)
    told = samples(board)
    assert told["nv_inference_request_success", ()] == 6
    assert told["nv_inference_count", ()] == 12
    assert told["nv_inference_exec_count", ()] == 3
    assert told["nv_inference_request_duration_us", ()] == 6000
    assert told["nv_inference_queue_duration_us", ()] == 1800
    assert told["nv_inference_compute_infer_duration_us", ()] == 3600
    assert told["headrace_stage_seconds_total", ("stage=compute",)] == pytest.approx(0.0036)
    assert told["headrace_lane_seconds_total", ("lane=1",)] == pytest.approx(0.0018)


def test_failures_are_told_by_our_reasons_and_by_tritons(board, row):
    for number, kind in enumerate(("full", "deadline", "cancelled", "model", "lost", "invalid", "unavailable")):
        for _ in range(number + 1):
            row.failed(kind, 5)
    told = samples(board)
    reasons = {reason: told["nv_inference_request_failure", (f"reason={reason}",)] for reason in TRITONS}
    assert reasons == {"REJECTED": 3, "CANCELED": 3, "BACKEND": 9, "OTHER": 13}
    assert told["headrace_request_failures_total", ("reason=lost",)] == 5


TRITONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")


def test_the_histogram_of_response_times_counts_what_does_not_exceed_each_bound(board, row):
    times_us = (9, 16, 17, 1000, 1000, 200_000_000)
    for took_us in times_us:
        answered(row, took_us, 1, 1)
    told = samples(board)
    bounds = buckets(told, "headrace_response_time_seconds_bucket")
    assert len(bounds) < 60
    for bound, count in bounds.items():
        assert count == sum(took_us / 1e6 <= bound for took_us in times_us)
    assert bounds[math.inf] == told["headrace_response_time_seconds_count", ()] == len(times_us)
    assert told["headrace_response_time_seconds_sum", ()] == pytest.approx(sum(times_us) / 1e6)


def test_the_histogram_of_batches_has_powers_of_two_as_bounds(board, row):
    for rows, times in ((1, 3), (32, 2), (33, 1), (64, 1)):
        answered(row, 1000, rows, rows, times)
    told = samples(board)
    bounds = buckets(told, "headrace_batch_rows_bucket")
    assert [bounds[size] for size in (1, 2, 16, 32, 64, math.inf)] == [3, 3, 3, 5, 7, 7]
    assert told["headrace_batch_rows_sum", ()] == 3 + 64 + 33 + 64


def buckets(told, name):
    found = {float(labels[0].removeprefix("le=")): value for (each, labels), value in told.items() if each == name}
    assert list(found) == sorted(found)
    return found


def test_no_number_has_an_exponent(board, row):
    answered(row, 10**9, 1 << 40, 1 << 40, times=3)
    answered(row, 1, 1, 1)
    lines = render(board.totals(), {}, [GPU], 1e-7).decode().splitlines()
    values = [line.rpartition(" ")[2] for line in lines if not line.startswith("#")]
    assert values
    assert all(re.fullmatch(r"\d+(\.\d+)?", value) for value in values)
    assert f"{3 * (1 << 40) + 1}" in values


def test_gauges_say_what_is_held_now_and_what_is_ready(board, row):
    row.hold(3, 10, 16)
    board.restarted(0)
    told = samples(board, {("m", "1"): True})
    assert told["nv_inference_pending_request_count", ()] == told["headrace_requests_in_flight", ()] == 3
    assert (told["headrace_ring_rows_free", ()], told["headrace_ring_rows", ()]) == (10, 16)
    assert told["headrace_backend_restarts_total", ()] == 1
    assert told["headrace_ready", ()] == 1
    assert told["headrace_uptime_seconds", ()] == 12.5
    assert samples(board, {("m", "1"): False})["headrace_ready", ()] == 0


def test_names_cannot_break_the_text(board):
    name = 'a"b\\c\nd{x="1"} 5'
    board.slot(name, "1")
    text = render(board.totals(), {(name, "1"): True}, [], 0).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["headrace_ready"].samples[0].labels == {"model": name, "version": "1"}


def test_a_gpu_has_one_label_and_a_share_between_0_and_1(board):
    told = samples(board, gpu=GPU)
    label = ("gpu_uuid=GPU-1",)
    assert told["nv_gpu_utilization", label] == 0.75
    assert told["nv_gpu_memory_used_bytes", label] == 61_234_567_890
    assert told["nv_gpu_memory_total_bytes", label] == 80_000_000_000
    assert told["nv_gpu_power_usage", label] == 350.5
    assert b'nv_gpu_memory_used_bytes{gpu_uuid="GPU-1"} 61234567890\n' in render(board.totals(), {}, [GPU], 0)


def test_without_a_gpu_or_without_an_answer_of_it_there_is_no_number(board):
    assert not [name for name, _ in samples(board) if name.startswith("nv_gpu")]
    silent = GpuReading(
        uuid="GPU-1",
        name="",
        utilization_pct=None,
        memory_used_bytes=None,
        memory_total_bytes=5,
        power_w=None,
        power_limit_w=None,
        temperature_c=None,
    )
    assert [name for name, _ in samples(board, gpu=silent) if name.startswith("nv_gpu")] == [
        "nv_gpu_memory_total_bytes"
    ]


def test_a_server_on_the_cpu_has_no_gpu():
    assert read_gpu("cpu")() is None


def test_the_gpu_is_asked_once_for_many_looks():
    asked = []

    def read():
        asked.append(1)
        return (GPU,)

    async def looks():
        watch = GpuWatch(read, wait_s=30)
        return await asyncio.gather(*[watch.look() for _ in range(5)])

    assert asyncio.run(looks()) == [(GPU,)] * 5
    assert len(asked) == 1


def test_a_gpu_that_does_not_answer_is_left_out_and_asked_once():
    hung, asked = threading.Event(), []

    def read():
        asked.append(1)
        hung.wait(30)
        return (GPU,)

    async def looks():
        watch = GpuWatch(read, wait_s=0.01)
        return [await watch.look() for _ in range(3)], hung.set()

    assert asyncio.run(looks())[0] == [()] * 3
    assert len(asked) == 1


def test_several_gpus_are_told_apart_by_their_one_label(board):
    text = render(board.totals(), {}, [GPU, replace(GPU, uuid="GPU-2", power_w=None)], 0).decode()
    assert text.count("# TYPE nv_gpu_memory_used_bytes gauge") == 1
    assert re.findall(r'nv_gpu_memory_used_bytes{gpu_uuid="(.*?)"}', text) == ["GPU-1", "GPU-2"]
    assert re.findall(r'nv_gpu_power_usage{gpu_uuid="(.*?)"}', text) == ["GPU-1"]


def test_engines_that_there_are_and_should_be(board):
    status = {"name": "m", "state": "READY", "required": True}
    versions = [
        VersionStatus(version="1", engines=2, engines_ready=1, **status),
        VersionStatus(version="2", engines=4, engines_ready=4, **status),
        VersionStatus(version="3", name="m", state="UNAVAILABLE"),
    ]
    text = render(board.totals(), {}, [], 0, versions).decode()
    found = re.findall(r'^(headrace_engines\w*){model="m",version="(\d)"} (\d)$', text, re.MULTILINE)
    assert found == [
        *[("headrace_engines", "1", "2"), ("headrace_engines", "2", "4")],
        *[("headrace_engines_ready", "1", "1"), ("headrace_engines_ready", "2", "4")],
    ], "and not of what nobody wants"
    assert [status.is_degraded for status in versions] == [True, False, False]


def test_each_engine_is_counted_for_itself_and_its_lanes_after_the_others():
    board = Board.private()
    row = board.row(0, board.slot("m", "1"))
    row.lanes = 2
    told = Descriptor(1, ANSWER, 0, 3, 1, 3, 0, 10, 20, 30, 40)  # on lane 1
    row.succeeded(5, 50, 3, told, engine=0)
    row.succeeded(5, 50, 3, told, engine=2)
    (totals,) = board.totals()
    assert totals.engine_requests[:3] == [1, 0, 1]
    assert totals.engine_rows[:3] == [3, 0, 3]
    assert [lane for lane, batches in enumerate(totals.lane_batches) if batches] == [1, 5]
    told = samples(board)
    assert told["headrace_engine_rows_total", ("engine=2",)] == 3
    assert ("headrace_engine_rows_total", ("engine=1",)) not in told
