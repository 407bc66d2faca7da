"""The comparison of benchmarks/servers: what its load generator counts and does not let pass, and several GPUs."""

import dataclasses
import json
import socketserver
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "servers"))
import compare
import load
import ray_gpus

import report

INPUTS = np.arange(4 * 6, dtype=np.float32).reshape(4, 6) + 1
EXPECTED = np.eye(4, 5, dtype=np.float32)


def right(rows):
    return EXPECTED[[int(row[0]) // 6 for row in rows]].tobytes()


def zeros(rows):
    return bytes(4 * 5 * len(rows))


def neighbours(rows):
    return EXPECTED[[(int(row[0]) // 6 + 1) % 4 for row in rows]].tobytes()


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        while self.rfile.readline():
            fields = {}
            while (line := self.rfile.readline().strip()) != b"":
                name, _, value = line.decode().partition(": ")
                fields[name] = value
            rows = np.frombuffer(self.rfile.read(int(fields["Content-Length"])), np.float32).reshape(-1, 6)
            answer = self.server.answer(rows)
            head = f"HTTP/1.1 {self.server.status}\r\nX-Other: 1\r\ncontent-length: {len(answer)}\r\n\r\n"
            self.wfile.write(head.encode() + answer)
            if self.server.closes:
                return


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    status, closes, answer = "200 OK", False, staticmethod(right)


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def plan(server, **changes):
    given = load.Plan(
        host="127.0.0.1",
        port=server.server_address[1],
        path="/",
        headers=("X-Own: 1",),
        body_prefix="",
        rows=1,
        connections=3,
        processes=2,
        warmup_s=0.1,
        seconds=0.4,
        drain_s=5,
        check_every=2,
        tolerance=1e-3,
    )
    return dataclasses.replace(given, **changes)


@pytest.mark.parametrize("rows", [1, 5])
def test_right_answers_count(server, rows):
    outcome = load.run(plan(server, rows=rows), INPUTS, EXPECTED)
    found = outcome.summary
    assert found["errors"] == found["early_errors"] == {}
    assert found["wrong"] == 0
    assert found["checked"] >= 3
    assert found["requests"] == len(outcome.latency_us) == len(outcome.completed_us) > 0
    assert found["samples_per_s"] == rows * found["requests_per_s"]
    assert outcome.completed_us.max() < 400_000


@pytest.mark.parametrize("answer", [zeros, neighbours], ids=["zeros", "another request's answer"])
def test_a_wrong_answer_is_an_error(server, answer):
    server.answer = answer
    found = load.run(plan(server), INPUTS, EXPECTED).summary
    assert found["wrong"] == found["checked"] > 0
    assert set(found["errors"]) == {"wrong answer"}


def test_an_answer_that_is_too_short_is_an_error(server):
    server.answer = lambda rows: right(rows)[:-4]
    assert set(load.run(plan(server), INPUTS, EXPECTED).summary["errors"]) == {"answer of another size"}


def test_refusals_are_errors_and_no_throughput(server):
    server.status = "503 Service Unavailable"
    found = load.run(plan(server), INPUTS, EXPECTED).summary
    assert found["requests"] == 0
    assert found["p99_ms"] is None
    assert set(found["errors"]) == {"status 503"}


def test_a_server_that_hangs_up_is_met_again(server):
    server.closes = True
    found = load.run(plan(server, connections=1, seconds=0.6), INPUTS, EXPECTED).summary
    assert found["requests"] > 1
    assert all(what.startswith("connection lost") for what in found["errors"])


def test_answers_too_alike_to_be_checked_are_refused(server):
    with pytest.raises(load.LoadError, match="two of the model's answers differ by"):
        load.run(plan(server, tolerance=0.9), INPUTS, EXPECTED)


def test_the_table_marks_what_is_no_throughput_of_the_server(tmp_path):
    common = {
        "status": "measured",
        "rows": 1,
        "connections": 8,
        "repeat": 0,
        "checked": 9,
        "client_cores": [0.5],
        "client_busy": False,
    }
    common["occupancy"] = 1.0
    numbers = dict.fromkeys(("samples_per_s", "p50_ms", "p99_ms", "server_cores", "rss_bytes", "pss_bytes"), 1.0)
    records = [
        common | numbers | {"server": "fine", "requests_per_s": 100.0, "errors": {}, "wrong": 0},
        common | numbers | {"server": "faulty", "requests_per_s": 200.0, "errors": {"wrong answer": 2}, "wrong": 2},
        common | numbers | {"server": "slow", "requests_per_s": 3.0, "errors": {}, "wrong": 0, "occupancy": 0.2},
        common | numbers | {"server": "null", "requests_per_s": 350.0, "errors": {}, "wrong": 0},
        common | {"server": "late", "status": "skipped", "reason": "no time left"},
    ]
    (tmp_path / "cells.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    text = report.table(tmp_path)
    assert "| fine | 100 | " in text
    assert "| faulty, client-limited | (200) | " in text
    assert "| slow, not steady | (3) | " in text
    assert "late (repeat 0), 8 connections, 1 rows: skipped: no time left" in text


def test_on_two_gpus_each_server_is_told_of_both():
    args = compare.parser().parse_args([*ray_gpus.words(haproxy=True), "--output", "out"])
    bench = compare.Bench(args, Path("work"), 0.05, 0.0)
    args.set = dict(args.set)
    told = {each.server.name: (each.server, each.settings) for each in compare.planned(bench)}
    headrace, on_ray = (told[name][0].command("python", told[name][1]) for name in ("headrace", "headrace-on-ray"))
    assert headrace[headrace.index("--gpus") + 1] == "0,1"
    assert on_ray[on_ray.index("--replicas") + 1] == "2"
    assert "--gpus" not in on_ray, "Ray chooses them"
    assert {(told[name][1].engines, told[name][1].workers) for name in ("ray", "ray-default")} == {(2, 1)}
    assert [name for name in told if name not in ray_gpus.words(haproxy=False)] == list(ray_gpus.WITH_HAPROXY)


def test_a_server_that_knows_one_gpu_is_not_compared_on_several(monkeypatch, tmp_path):
    output = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["compare.py", "--servers", "null", "mosec", "--engines", "2", "--output", f"{output}"]
    )
    with pytest.raises(SystemExit, match="--engines 2: mosec would use one GPU"):
        compare.main()
    assert not output.exists()
