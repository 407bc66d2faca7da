"""The null server over gRPC: the same law, kept and logged, and the same faults, found by a real generator."""

import re

import grpc
import numpy as np
import pytest

from headrace.bench import calibration
from headrace.config import InputConfig, LoadConfig, RunConfig, TargetConfig
from headrace.errors import InvalidOption
from headrace.target import calibrate
from headrace.target.law import Law, parse_law
from headrace.target.null_grpc import LOG, NullGrpcServer
from headrace.target.null_server import read_log
from headrace.target.run import Files, run_target
from headrace.wire.grpc import inference_pb2 as pb
from tests import commands
from tests.target.running import Silent, answered, measure, poisson
from tests.target.test_calibrate import MS
from tests.target.test_law import lindley

INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.mark.parametrize(
    ("law", "rate"), [("null://fixed?service=10ms", 70), ("null://exponential?mean=10ms&seed=1", 70)]
)
def test_the_law_is_kept_and_what_a_generator_sees_holds_it(tmp_path, law, rate):
    """What the harness adds is on top, whatever the machine does: it never takes away."""
    outcome = measure(tmp_path, f"{law}&transport=grpc", poisson(rate, 2))
    log, seen = outcome.log, answered(outcome)
    assert outcome.summary.error is None
    assert len(seen) == len(log) == outcome.summary.target.server_success == outcome.summary.metrics.requests
    assert log["due_ns"].tolist() == lindley(log["arrived_ns"].tolist(), log["service_ns"].tolist()).tolist()
    assert (log["answered_ns"] >= log["due_ns"]).all()
    assert log["service_ns"].tolist() == parse_law(law).service_times_ns()[: len(log)]
    service = seen["completed_ns"] - seen["issued_ns"]
    assert service.mean() >= (log["answered_ns"] - log["arrived_ns"]).mean()


def test_what_a_server_refuses_is_counted(tmp_path):
    outcome = measure(tmp_path, "null://fixed?service=100us&shed=0.05&transport=grpc", poisson(200, 1))
    shed = int((outcome.log["fate"] == 1).sum())
    assert outcome.summary.metrics.shed == outcome.summary.target.server_fail == shed > 0
    assert f"refused {shed} of" in outcome.summary.error


def test_wrong_answers_are_found_one_by_one(tmp_path):
    outcome = measure(tmp_path, "null://fixed?service=100us&wrong=0.05&transport=grpc", poisson(200, 1), rows=3)
    wrong = int((outcome.log["fate"] == 2).sum())
    assert outcome.summary.metrics.wrong == wrong > 0
    assert outcome.summary.answers.wrong_rows == 3 * wrong


def test_dropped_requests_are_unanswered(tmp_path):
    url = "null://fixed?service=100us&drop=0.05&transport=grpc"
    outcome = measure(tmp_path, url, poisson(200, 1), request_timeout_s=2)
    dropped = int((outcome.log["fate"] == 3).sum())
    assert outcome.summary.metrics.unanswered >= dropped > 0
    assert (outcome.log["answered_ns"][outcome.log["fate"] == 3] == 0).all()
    assert "never answered: DEADLINE_EXCEEDED" in outcome.summary.error


def test_a_cache_is_named(tmp_path):
    outcome = measure(tmp_path, "null://fixed?service=50ms&cached=1&transport=grpc", poisson(20, 1))
    assert any("the server caches" in mark for mark in outcome.summary.marks)


@pytest.mark.parametrize(
    "message",
    [
        b"\xff\xff",
        pb.ModelInferRequest(model_name="null").SerializeToString(),
        pb.ModelInferRequest(
            inputs=[pb.ModelInferRequest.InferInputTensor(name="input", datatype="FP32", shape=[1, 2])],
            raw_input_contents=[b"1234"],
        ).SerializeToString(),
    ],
    ids=["no message", "no input", "too few bytes"],
)
def test_what_is_no_request_is_refused(message):
    server = NullGrpcServer(Law(input_bytes=8))
    with grpc.insecure_channel(f"127.0.0.1:{server.start('127.0.0.1', 0)}") as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(INFER)(message, timeout=20)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    server.stop()


def test_a_port_that_is_taken_is_named():
    server = NullGrpcServer(Law())
    port = server.start("127.0.0.1", 0)
    with pytest.raises(InvalidOption, match=f"--port {port}: cannot listen"):
        NullGrpcServer(Law()).start("127.0.0.1", port)
    server.stop()


def test_the_command_serves_other_load_generators(tmp_path):
    law = "null://fixed?service=1ms&bytes=8&transport=grpc"
    request = pb.ModelInferRequest(model_name="null", raw_input_contents=[np.ones(2, np.float32).tobytes()])
    request.inputs.add(name="input", datatype="FP32", shape=[1, 2])
    with commands.start("null-server", "--law", law, "--port", 0, cwd=tmp_path) as process:
        address = re.search(r"grpc://([\d.:]+),", process.stderr.readline())[1]
        with grpc.insecure_channel(address) as channel:
            answers = [channel.unary_unary(INFER)(request.SerializeToString(), timeout=30) for _ in range(2)]
            log = read_log(channel.unary_unary(LOG)(b"", timeout=30))
    assert answers[0] == answers[1]
    assert list(pb.ModelInferResponse.FromString(answers[0]).outputs[0].shape) == [1, 8]
    assert log["service_ns"].tolist() == [MS, MS]


def test_the_harness_is_calibrated_over_grpc_and_runs_over_grpc_are_held_against_that_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "trials", lambda _: (calibrate.Trial("null://fixed?service=20ms", 20),))
    monkeypatch.setattr(calibrate, "PAYLOADS", (1_024,))
    made = calibrate.calibrate(1, 0.8, Silent(), "grpc")
    (recovered,), (ceiling,) = made.recovered, made.ceilings
    assert made.transport == "grpc"
    assert recovered.p50_error > -0.001, "a machine adds time, and takes none away"
    assert ceiling.requests_per_s > 0 < ceiling.p50_s <= ceiling.p99_s
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    calibration.save(made, calibration.default_path(made.machine, {"XDG_STATE_HOME": str(tmp_path)}, transport="grpc"))
    load = LoadConfig(kind="closed", concurrency=1, num_iters=20)
    over = {each: run_here(tmp_path, f"null://fixed?service=1ms&transport={each}", load) for each in ("grpc", "http")}
    assert over["grpc"].calibration == made
    assert not any("not calibrated" in mark for mark in over["grpc"].marks)
    assert over["http"].calibration is None
    assert any("not calibrated on this machine" in mark for mark in over["http"].marks)


def run_here(folder, url, load):
    """Measure, and hold the run against what this machine's state says."""
    config = RunConfig(inputs=InputConfig(kind="random", batch_size=1), load=load, target=TargetConfig(url=url))
    return run_target(config, Files(output_dir=folder / "run", overwrite=True), (), Silent()).summary


def test_a_transport_that_there_is_not_is_refused():
    with pytest.raises(InvalidOption, match="transport=quic; give http or grpc"):
        parse_law("null://fixed?transport=quic")
