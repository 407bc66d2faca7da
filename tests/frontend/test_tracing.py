"""Requests as spans: what a collector gets from a real server, whom sampling follows, what failures cost."""

import json
import queue
import socket
import subprocess
import sys

import numpy as np
import pytest
import tritonclient.grpc as triton
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from headrace.errors import DeadlineExceeded, InvalidOption, InvalidRequest
from headrace.frontend.board import STAGES
from headrace.frontend.tracing import PACKAGES, Trace, require_packages, rpc_outcome
from tests.commands import call, environment
from tests.frontend.collector import Collector, attributes
from tests.serving import WAIT_S, Server, infer_body

PATH = "/v2/models/served/infer"
PARENT_ID = "b7ad6b7169203331"
SERVICE = "inference.GRPCInferenceService"


def caller(number, *, sampled=True):
    """Return the header of a caller, whose trace is called by a number."""
    return {"traceparent": f"00-{number:032x}-{PARENT_ID}-{'01' if sampled else '00'}", "tracestate": "vendor=x"}


@pytest.fixture(scope="module", autouse=True)
def _soon():
    """Servers of these tests send spans soon: OpenTelemetry's variable, in milliseconds."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield


@pytest.fixture(scope="module")
def collector():
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(tmp_path_factory, collector):
    """A server that traces only what callers want traced."""
    server = Server(tmp_path_factory.mktemp("server"), "--trace-endpoint", collector.endpoint, "--trace-ratio", "0")
    yield server
    assert server.stop() == 0
    assert not any("traces" in line for line in server.lines)


def traced(collector, number, spans=1):
    """Return a trace's spans by name, once so many have come."""
    seen = 0
    while True:
        found = [span for span in collector.wait_for(seen) if int.from_bytes(span.trace_id) == number]
        if len(found) >= spans:
            return {span.name: span for span in found}
        seen = len(collector.spans) + 1


def require_stages(spans, parent):
    """Check that the stages follow each other without a gap, within their request."""
    stages = [spans[name] for name in STAGES]
    assert all(each.parent_span_id == parent.span_id for each in stages)
    assert all(each.kind == Span.SPAN_KIND_INTERNAL for each in stages)
    stamps = [(each.start_time_unix_nano, each.end_time_unix_nano) for each in stages]
    assert [began for began, _ in stamps[1:]] == [ended for _, ended in stamps[:-1]]
    assert all(began <= ended for began, ended in stamps)
    assert parent.start_time_unix_nano <= stamps[0][0]
    assert stamps[-1][1] <= parent.end_time_unix_nano


def test_a_request_over_http_is_a_span_of_its_callers_trace_with_a_part_for_each_stage(server, collector):
    body = json.dumps(infer_body([1, 2, 3, 4])).encode()
    assert server.call(PATH, body, caller(1))[0] == 200
    spans = traced(collector, 1, 6)
    request = spans[f"POST {PATH.replace('served', '{name}')}"]
    assert request.kind == Span.SPAN_KIND_SERVER
    assert request.parent_span_id.hex() == PARENT_ID
    assert request.trace_state == "vendor=x"
    assert request.status.code == Status.STATUS_CODE_UNSET
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/v2/models/{name}/infer",
        "url.path": PATH,
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "http.response.status_code": 200,
        "headrace.model.name": "served",
        "headrace.model.version": "1",
        "headrace.request.rows": 1,
        "headrace.batch.rows": 1,
        "headrace.lane": 0,
    }
    require_stages(spans, request)
    told = collector.resources[-1]
    assert told["service.name"] == "headrace"
    assert told["process.pid"] == server.frontend().pid


def test_what_goes_wrong_is_told_and_is_a_failure_only_if_it_is_the_servers(server, collector):
    version = "/v2/models/served/versions/1/infer"
    for number, (path, body) in enumerate(
        [(PATH, infer_body([13, 0, 0, 0])), (version, b"{"), ("/v2/models/other/infer", b"{}")], 10
    ):
        server.call(path, body, caller(number))
    raised, invalid, unknown = (next(iter(traced(collector, number).values())) for number in (10, 11, 12))
    assert raised.status.code == Status.STATUS_CODE_ERROR
    assert "thirteen" in raised.status.message
    assert attributes(raised)["http.response.status_code"] == 500
    assert attributes(raised)["error.type"] == "ModelFailed"
    assert attributes(raised)["headrace.model.name"] == "served"
    assert invalid.name == "POST /v2/models/{name}/versions/{version}/infer"
    for span, status, error in ((invalid, 400, "InvalidRequest"), (unknown, 404, "UnknownModel")):
        assert span.status.code == Status.STATUS_CODE_UNSET
        assert attributes(span)["http.response.status_code"] == status
        assert attributes(span)["error.type"] == error


def test_a_client_that_leaves_is_told(server, collector):
    body = json.dumps(infer_body([77, 0, 0, 0])).encode()
    head = [f"POST {PATH} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    head += [f"{name}: {value}" for name, value in caller(15).items()]
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall("\r\n".join([*head, "\r\n"]).encode() + body)
        gate = server.gate.open("w")  # which waits until the model has begun
    with gate:
        (left,) = traced(collector, 15).values()
    assert attributes(left)["error.type"] == "CancelledError"
    assert "http.response.status_code" not in attributes(left)


def grpc_inputs(*ids):
    values, numbers = triton.InferInput("values", [1, 3], "FP32"), triton.InferInput("ids", [1, 4], "INT64")
    values.set_data_from_numpy(np.zeros((1, 3), np.float32))
    numbers.set_data_from_numpy(np.array([ids], np.int64))
    return [values, numbers]


def test_requests_over_grpc_are_spans_too_and_each_one_of_a_stream(server, collector):
    with triton.InferenceServerClient(server.grpc_address) as client:
        client.infer("served", grpc_inputs(1, 2, 3, 4), headers=caller(20))
        with pytest.raises(triton.InferenceServerException):
            client.infer("served", grpc_inputs(13, 0, 0, 0), headers=caller(21))
        answers = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)), headers=caller(22))
        for _ in range(2):
            client.async_stream_infer("served", grpc_inputs(1, 2, 3, 4))
            answers.get(timeout=WAIT_S)
        client.stop_stream()
    spans = traced(collector, 20, 6)
    request = spans[f"{SERVICE}/ModelInfer"]
    assert request.kind == Span.SPAN_KIND_SERVER
    assert request.parent_span_id.hex() == PARENT_ID
    told = attributes(request)
    assert (told["rpc.system.name"], told["rpc.method"]) == ("grpc", f"{SERVICE}/ModelInfer")
    assert told["rpc.response.status_code"] == "OK"
    assert (told["headrace.model.name"], told["headrace.batch.rows"]) == ("served", 1)
    require_stages(spans, request)
    (raised,) = traced(collector, 21).values()
    assert raised.status.code == Status.STATUS_CODE_ERROR
    assert attributes(raised)["error.type"] == "ModelFailed"
    traced(collector, 22, 12)
    streamed = [span.name for span in collector.spans if int.from_bytes(span.trace_id) == 22]
    assert streamed.count(f"{SERVICE}/ModelStreamInfer") == 2


@pytest.mark.parametrize(
    ("error", "code", "has_failed"),
    [
        (None, "OK", False),
        (InvalidRequest("no"), "INVALID_ARGUMENT", False),
        (DeadlineExceeded("late"), "DEADLINE_EXCEEDED", True),
        (KeyError("ours"), "INTERNAL", True),
        (GeneratorExit(), "CANCELLED", False),
    ],
)
def test_over_grpc_a_failure_is_what_the_client_cannot_help(error, code, has_failed):
    outcome = rpc_outcome("a/B", Trace(0, error=error))
    assert outcome.attributes["rpc.response.status_code"] == code
    assert outcome.has_failed is has_failed


def test_what_callers_do_not_want_traced_is_not_and_the_rest_is_by_the_ratio(server, collector):
    body = json.dumps(infer_body([1, 2, 3, 4])).encode()
    before = {span.trace_id for span in collector.spans}
    headers = [{}, caller(30, sampled=False), {"traceparent": "00-nonsense-01"}, {"traceparent": "x" * 9000}]
    for each in (*headers, caller(31)):
        assert server.call(PATH, body, each)[0] == 200
    server.call("/v2/models/served", headers=caller(32))  # no infer request
    server.call(PATH, body, caller(33))
    traced(collector, 33, 6)
    after = {span.trace_id for span in collector.spans}
    assert {int.from_bytes(each) for each in after - before} == {31, 33}


def test_at_the_end_what_waits_is_sent(tmp_path):
    with Collector() as collector:
        server = Server(tmp_path, "--trace-endpoint", collector.endpoint, "--trace-ratio", "1", "--frontends", "2")
        for _ in range(30):
            assert server.infer([1, 2, 3, 4])[0] == 200
        assert server.stop() == 0
        roots = [span for span in collector.spans if not span.parent_span_id]
        assert len({span.trace_id for span in roots}) == len(roots) == 30
        assert len(collector.spans) == 30 * 6


def test_a_collector_that_is_not_there_is_told_once_and_costs_no_request(tmp_path):
    with Collector() as gone:
        pass
    server = Server(tmp_path, "--trace-endpoint", gone.endpoint, "--trace-ratio", "1", "--frontends", "2")
    for _ in range(30):
        assert server.infer([1, 2, 3, 4])[0] == 200
    told = server.wait_for("traces do not all get to ")
    assert gone.endpoint in told
    assert "Connection refused" in told
    for _ in range(30):
        assert server.infer([1, 2, 3, 4])[0] == 200
    assert server.stop() == 0
    server._drain.join()
    assert sum("traces" in line or "opentelemetry" in line for line in server.lines) == 1


def test_a_collector_that_does_not_answer_costs_no_request_and_holds_up_no_end(tmp_path):
    with Collector(silent=True) as collector:
        server = Server(tmp_path, "--trace-endpoint", collector.endpoint, "--trace-ratio", "1")
        assert server.infer([1, 2, 3, 4])[0] == 200
        collector.wait_for(1)
        for _ in range(30):
            assert server.infer([1, 2, 3, 4])[0] == 200
        assert server.stop() == 0


@pytest.mark.parametrize("missing", [0, 1])
def test_without_its_packages_a_server_that_is_to_trace_does_not_start(missing):
    def find(name):
        if not missing:
            raise ModuleNotFoundError(name="opentelemetry")

    with pytest.raises(InvalidOption, match=r"opentelemetry.* is not installed\); pip install 'headrace\[tracing\]'"):
        require_packages(find)
    require_packages(lambda name: name in PACKAGES or None)


def test_an_endpoint_that_is_none_is_refused_before_anything_starts(tmp_path):
    ended = call("serve", "resnet18", "--trace-endpoint", "127.0.0.1:4318", cwd=tmp_path)
    assert ended.code == 2
    assert "must be http://HOST:PORT" in ended.message


def test_a_frontend_that_does_not_trace_loads_nothing_for_it():
    code = "import headrace.frontend.process, sys; assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=WAIT_S)
