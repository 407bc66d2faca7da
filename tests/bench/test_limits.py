"""What no server can exceed: the arithmetic by hand, `headrace limits` end to end, and how it fails."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
import torch

from headrace import nvml
from headrace.bench import environment, limits, ring_rate
from headrace.bench.limits_host import memcpy_threads
from headrace.bench.limits_jobs import RING_LAYOUT
from headrace.bench.limits_picture import draw
from headrace.bench.limits_report import (
    PICTURE_NAME,
    REPORT_NAME,
    BatchLimits,
    Binding,
    LimitsConfig,
    LimitsReport,
    RingRates,
    smallest,
)
from headrace.bench.summary import Limits, TorchFacts, encode
from headrace.config import LanesConfig, ModelConfig
from headrace.transport.pair import RingPair
from headrace.transport.ring import RingClient, RingEndpoint
from tests.commands import call, model_file, run

MIB = 1 << 20
WINDOW_NS = int(limits.WINDOW_S * 1e9)
RING = RingRates(one_at_a_time_per_s=10.0, many_at_once_per_s=300.0, in_flight=4)


def limits_of(bucket=2, **changes):
    """Return limits of which compute allows 900 samples/s, the copies 500 and 4,000, and the host's memory 700."""
    return Limits(
        **{
            "bucket": bucket,
            "row_bytes": 100,
            "answer_bytes": 10,
            "forward_samples_per_s": {1: 800.0, 2: 900.0, 4: 850.0},
            "h2d_bytes_per_s": 50_000.0,
            "d2h_bytes_per_s": 40_000.0,
            "memcpy_bytes_per_s": {1: 30_000.0, 2: 70_000.0},
            **changes,
        }
    )


FAST_COPY = {"h2d_bytes_per_s": 5e6}


@pytest.mark.parametrize(
    ("measured", "copying", "in_place"),
    [
        (limits_of(), ("copy in", 500), ("copy in", 500)),
        (limits_of(**FAST_COPY), ("ring messages", 600), ("ring messages", 600)),
        (limits_of(8, **FAST_COPY), ("host memory", 700), ("compute", 900)),
        (limits_of(8, d2h_bytes_per_s=1_000.0), ("copy out", 100), ("copy out", 100)),
        (limits_of(8, h2d_bytes_per_s=None, d2h_bytes_per_s=None), ("host memory", 700), ("compute", 900)),
    ],
    ids=["copies in", "messages of 2 rows", "the client's own copy", "copies out", "no device"],
)
def test_the_smallest_limit_binds(measured, copying, in_place):
    batch = BatchLimits.of(measured, RING)
    assert batch.binding == Binding(name=copying[0], samples_per_s=copying[1])
    assert batch.binding_in_place == Binding(name=in_place[0], samples_per_s=in_place[1])
    assert batch.binding.samples_per_s == min(batch.samples_per_s.values())


def test_every_limit_is_told_in_samples_per_second():
    assert BatchLimits.of(limits_of(), RING).samples_per_s == {
        "compute": 900,
        "copy in": 500,
        "copy out": 4000,
        "host memory": 700,
        "ring messages": 600,
    }


def test_of_equal_limits_the_first_is_named():
    assert smallest({"a": 2.0, "b": 1.0, "c": 1.0}) == Binding(name="b", samples_per_s=1.0)


@pytest.mark.parametrize(
    ("available", "size"),
    [(64 << 30, 512 * MIB), (4 << 30, 512 * MIB), (800 * MIB, 100 * MIB), (0, MIB)],
    ids=["much", "just enough", "a small machine", "nothing"],
)
def test_what_is_copied_within_memory_is_as_large_as_memory_allows(available, size):
    assert limits.memcpy_bytes(available) == size


@pytest.mark.parametrize(
    ("cpus", "threads"),
    [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (16, (1, 2, 4, 8, 16)), (200, (1, 2, 4, 8, 16, 32, 64))],
)
def test_copies_are_tried_with_powers_of_two_and_all_cpus(cpus, threads):
    assert memcpy_threads(cpus) == threads


class Work:
    """Takes so long for a round; remembers how many rounds it was asked for."""

    def __init__(self, round_ns):
        self.round_ns = round_ns
        self.asked = []

    def __call__(self, rounds):
        self.asked.append(rounds)
        return rounds * self.round_ns


@pytest.mark.parametrize(
    ("round_ns", "asked"),
    [
        (WINDOW_NS, [1, 1]),
        (WINDOW_NS // 2, [1, 1, 2]),
        (WINDOW_NS // 100, [1, 1, 2, 4, 8, 16, 100]),
    ],
    ids=["as long as the window: once", "half of it: twice", "short: as many as fill it"],
)
def test_a_rate_is_measured_over_the_window_after_a_warm_up(round_ns, asked):
    work = Work(round_ns)
    assert limits.rate(work) == pytest.approx(1e9 / round_ns)
    assert work.asked == asked


class FakeLane:
    def __init__(self):
        self.replayed = set()
        self.closed = False

    def replay(self, bucket):
        self.replayed.add(bucket)

    def synchronize(self):
        pass

    def close(self):
        self.closed = True


def lane_set(count, room):
    """Return lanes on a device with room for so many more."""
    made = []

    def make_lane(slots):
        assert slots == 1
        if len(made) == room:
            raise torch.OutOfMemoryError("full")
        made.append(FakeLane())
        return made[-1]

    return SimpleNamespace(lanes=tuple(FakeLane() for _ in range(count)), make_lane=make_lane, made=made)


@pytest.mark.parametrize(
    ("own", "room", "given"),
    [(1, 9, 4), (1, 2, 3), (4, 9, 4), (6, 0, 6)],
    ids=["more are made", "as many as fit", "there are enough", "there are more"],
)
def test_lanes_are_added_as_far_as_memory_goes_and_closed_again(own, room, given):
    lanes = lane_set(own, room)
    with limits.lanes_up_to(lanes, 4) as available:
        assert len(available) == given
    assert all(lane.closed for lane in lanes.made)
    assert not any(lane.closed for lane in lanes.lanes)


def test_the_forward_is_measured_with_as_many_streams_as_there_are_lanes(monkeypatch):
    monkeypatch.setattr(limits, "WINDOW_S", 1e-3)
    lanes = [FakeLane() for _ in range(3)]
    rates = limits.forward_rates(lanes, 8, (1, 2, 4))
    assert list(rates) == [1, 2]
    assert min(rates.values()) > 0
    assert [lane.replayed for lane in lanes] == [{8}, {8}, set()]


def test_every_message_is_answered_once():
    pair = RingPair.create(replace(RING_LAYOUT, rows=5))
    client, endpoint = RingClient(pair), RingEndpoint(pair, lambda _memory: lambda: None)
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(ring_rate.answer_all, endpoint)
        for count, most in ((1, 1), (7, 1), (3, 5), (64, 5)):
            assert ring_rate.exchange(client, count, most) > 0
        client.close()
        assert answered.result(20) == 1 + 7 + 3 + 64
    pair.close()


def report_of(*batches):
    return LimitsReport(
        schema_version=1,
        started_at="2026-01-01T00:00:00+00:00",
        took_s=1.0,
        command=("headrace", "limits"),
        config=LimitsConfig(
            device="cuda",
            model=ModelConfig(name="resnet18", precision="bf16", compile=True),
            lanes=LanesConfig(buckets=(1, 32)),
            wire="float32",
            image_size=250,
        ),
        form="CUDA graphs",
        memcpy_buffer_bytes=512 * MIB,
        ring=RING,
        batches=tuple(BatchLimits.of(batch, RING) for batch in batches),
        environment=replace(environment.collect(None), gpu_name="NVIDIA H100"),
        torch=TorchFacts(
            torch="2",
            torchvision="0",
            cuda="13",
            cudnn=9,
            device_name="NVIDIA H100",
            cudnn_tf32=True,
            matmul_tf32=False,
            threads=1,
        ),
        notes=("a note",),
    )


def test_the_title_says_model_precision_and_device():
    assert report_of(limits_of()).title == "resnet18, bf16, compiled, NVIDIA H100"


def test_a_picture_is_drawn_of_any_number_of_batch_sizes(tmp_path):
    pytest.importorskip("matplotlib")
    assert draw(report_of(limits_of(1), limits_of(32), limits_of(256, d2h_bytes_per_s=None)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_no_picture_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not draw(report_of(limits_of()), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def read_report(folder):
    """Read limits.json by the types that it was made from."""
    return msgspec.json.decode(
        (folder / REPORT_NAME).read_bytes(), type=LimitsReport, dec_hook=lambda kind, value: kind(value)
    )


def test_the_file_says_all_that_the_report_does(tmp_path):
    report = report_of(limits_of(1), limits_of(32))
    (tmp_path / REPORT_NAME).write_bytes(encode(report))
    assert read_report(tmp_path) == report


QUICK = ("limits", "--device", "cpu", "--image-size", "48")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    model = model_file(folder)
    ended = run(*QUICK, "--model", model, "--batch-sizes", "4", "1", "--output-dir", "out", cwd=folder)
    assert ended.code == 0, ended.err
    return ended, folder / "out"


def test_the_limits_of_a_model_are_measured_and_kept(finished):
    report = read_report(finished[1])
    assert [batch.measured.bucket for batch in report.batches] == [1, 4]
    assert report.ring.many_at_once_per_s > report.ring.one_at_a_time_per_s > 0
    for batch in report.batches:
        measured = batch.measured
        assert (measured.row_bytes, measured.answer_bytes) == (3 * 48 * 48 * 4, 10 * 4)
        assert list(measured.forward_samples_per_s) == [1, 2]
        assert measured.h2d_bytes_per_s is None
        assert min(*measured.forward_samples_per_s.values(), *measured.memcpy_bytes_per_s.values()) > 0
        assert set(batch.samples_per_s) == {"compute", "host memory", "ring messages"}
        assert batch.binding.samples_per_s == min(batch.samples_per_s.values())
        assert batch.binding.samples_per_s == batch.samples_per_s[batch.binding.name]


def test_every_kind_of_limit_is_shown_with_what_binds(finished):
    ended, _ = finished
    titles = ("The model alone", "Copies within the host's memory", "Ring messages", "What binds")
    assert [title for title in titles if title in ended.out] == list(titles)
    assert "Copies between pinned memory and the device" not in ended.out, "a host has no device"
    assert "5 of 6: the model alone, batch size 1" in ended.err
    assert "files: out/ (limits.json" in ended.out


def test_a_picture_lies_beside_the_numbers(finished):
    pytest.importorskip("matplotlib")
    assert (finished[1] / PICTURE_NAME).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--batch-sizes", "0", "3"], 2, "--batch-sizes 0 3: a batch has at least 1 row"),
        (["--wire", "jpeg"], 2, "--wire jpeg: choose one of float32, uint8"),
        (["--output-dir", "file/out"], 1, "cannot be written"),
        (["--output-dir", "."], 1, "exists already"),
        pytest.param(
            ["--device", "cuda"],
            2,
            "--device cuda: no such NVIDIA GPU",
            marks=pytest.mark.skipif(nvml.open_gpu(0) is not None, reason="there is a GPU"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_work_is_refused_at_once(tmp_path, options, code, words):
    (tmp_path / "file").write_text("")
    ended = call(*QUICK, *options, cwd=tmp_path)
    assert ended.code == code
    assert words in ended.message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_that_fails_is_told_in_one_line_and_nothing_is_left(tmp_path):
    model = model_file(tmp_path, "import torch\n\ndef build():\n    return torch.nn.Linear(7, 7)\n")
    ended = run(*QUICK, "--model", model, "--output-dir", "out", cwd=tmp_path)
    assert ended.code == 1
    assert "the model fails on the example inputs (input_0 [8, 3, 48, 48])" in ended.message
    assert not (tmp_path / "out").exists()
