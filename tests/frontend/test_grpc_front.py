"""The gRPC front by itself, with known clients and a backend that answers when it is told to."""

import asyncio
import contextlib
import functools
import time

import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
import trustme
from tritonclient.grpc import service_pb2

from headrace.control import RegionsChanged
from headrace.errors import QueueFull
from headrace.frontend.grpc_calls import STREAM_REQUESTS
from headrace.frontend.grpc_v2 import GrpcFront, GrpcSettings, TlsFiles
from headrace.frontend.regions import Regions, SharedRegions
from tests.frontend.grpc_fakes import FakeLink, service_of

WAIT_S = 60


@contextlib.asynccontextmanager
async def serving(link, *, offered=False, **settings):
    """Serve on a port of its own, and yield front, regions and address."""
    regions = SharedRegions(Regions(offered=offered), lambda word: None)
    front = GrpcFront(service_of(link), regions, GrpcSettings(**({"max_message_bytes": 10_000} | settings)))
    port = await front.start("127.0.0.1", 0)
    try:
        yield front, regions, f"127.0.0.1:{port}"
    finally:
        await front.stop(0)


def within_limit(test):
    """Run a test's coroutine on a loop of its own, and give up on a hang."""

    @functools.wraps(test)
    def run(*arguments, **named):
        async def limited():
            async with asyncio.timeout(WAIT_S):
                await test(*arguments, **named)

        asyncio.run(limited())

    return run


def infer_input(*values):
    given = triton.InferInput("x", [len(values)], "UINT8")
    given.set_data_from_numpy(np.array(values, np.uint8))
    return [given]


def message(*values, request_id=""):
    request = service_pb2.ModelInferRequest(model_name="served", id=request_id, raw_input_contents=[bytes(values)])
    request.inputs.add(name="x", datatype="UINT8", shape=[len(values)])
    return request


@within_limit
async def test_an_answer_carries_the_outputs_and_the_id():
    async with serving(FakeLink(at_once=True)) as (_, _, address), triton.InferenceServerClient(address) as client:
        answer = await client.infer("served", infer_input(1, 2, 3), request_id="r")
        assert answer.as_numpy("y").tolist() == [1, 2, 3]
        assert answer.get_response().id == "r"


@within_limit
async def test_timeout_priority_and_deadline_become_the_requests():
    link = FakeLink(at_once=True)
    async with serving(link) as (_, _, address), triton.InferenceServerClient(address) as client:
        began = time.monotonic_ns()
        await client.infer("served", infer_input(1), timeout=5_000_000, priority=3)
        await client.infer("served", infer_input(1), client_timeout=50)
        await client.infer("served", infer_input(1), client_timeout=50, timeout=5_000_000)
        await client.infer("served", infer_input(1))
        ended = time.monotonic_ns()
    limits = [(call.deadline_ns, call.priority) for call in link.calls]
    assert began < limits[0][0] - 5 * 10**9 < ended
    assert limits[0][1] == 3
    assert limits[1][0] < ended + 60 * 10**9  # gRPC rounds what it sends
    assert limits[1][0] > ended + 5 * 10**9
    assert limits[2][0] < ended + 5 * 10**9
    assert limits[3] == (0, 0)


@within_limit
async def test_a_client_that_cancels_or_whose_deadline_passes_ends_its_call():
    link = FakeLink()
    async with serving(link) as (_, _, address), triton.InferenceServerClient(address) as client:
        asked = asyncio.ensure_future(client.infer("served", infer_input(1)))
        call = await link.held(1)
        asked.cancel()
        await call.cancelled.wait()
        asked = asyncio.ensure_future(client.infer("served", infer_input(1), client_timeout=2))
        call = await link.held(2)
        with pytest.raises(triton.InferenceServerException, match="Deadline Exceeded"):
            await asked
        await call.cancelled.wait()


@within_limit
async def test_a_full_server_says_when_to_come_back():
    link = FakeLink()
    async with serving(link) as (_, _, address), grpc.aio.insecure_channel(address) as channel:
        stub = triton.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        asked = asyncio.ensure_future(stub.ModelInfer(message(1)))
        (await link.held(1)).answered.set_exception(QueueFull("no room"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asked
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "no room"
    assert dict(caught.value.trailing_metadata())["retry-after"] == "1"


@within_limit
async def test_our_own_bugs_are_logged_and_not_told(caplog):
    link = FakeLink()
    async with serving(link) as (_, _, address), triton.InferenceServerClient(address) as client:
        asked = asyncio.ensure_future(client.infer("served", infer_input(1)))
        (await link.held(1)).answered.set_exception(KeyError("inside"))
        with pytest.raises(triton.InferenceServerException, match="the server failed on this call") as caught:
            await asked
    assert caught.value.status() == "StatusCode.INTERNAL"
    assert "inside" not in str(caught.value)
    assert "KeyError" in caplog.text


@within_limit
async def test_bytes_that_are_no_message_are_refused():
    async with serving(FakeLink()) as (_, _, address), grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="no protobuf message") as caught:
            await channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\x0a\x10x")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@within_limit
async def test_a_long_error_still_fits_into_a_header():
    async with (
        serving(FakeLink(), max_message_bytes=20_000) as (_, _, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = triton.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="there is no model") as caught:
            await stub.ModelInfer(service_pb2.ModelInferRequest(model_name="☃" * 5000))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@within_limit
async def test_messages_beyond_the_limit_are_refused():
    async with serving(FakeLink()) as (_, _, address), grpc.aio.insecure_channel(address) as channel:
        stub = triton.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="larger than max") as caught:
            await stub.ModelInfer(message(*[1] * 200, request_id="x" * 10_000))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@within_limit
async def test_calls_beyond_the_limit_are_refused():
    link = FakeLink()
    async with (
        serving(link, max_concurrent_calls=2) as (_, _, address),
        triton.InferenceServerClient(address) as client,
    ):
        held = [asyncio.ensure_future(client.infer("served", infer_input(1))) for _ in range(2)]
        await link.held(2)
        with pytest.raises(triton.InferenceServerException, match="RESOURCE_EXHAUSTED"):
            await client.infer("served", infer_input(1))
        for call in link.calls:
            call.answered.set_result(None)
        await asyncio.gather(*held)


async def requests(*messages):
    for each in messages:
        yield each


@within_limit
async def test_a_streams_requests_run_side_by_side_and_are_answered_in_order():
    link = FakeLink()
    async with serving(link) as (_, _, address), grpc.aio.insecure_channel(address) as channel:
        stub = triton.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        asked = [message(number, request_id=str(number)) for number in range(3)]
        answers = stub.ModelStreamInfer(requests(*asked))
        await link.held(3)  # all are computed before the first is answered
        link.calls[2].answered.set_result(None)
        link.calls[1].answered.set_exception(QueueFull("no room"))
        link.calls[0].answered.set_result(None)
        told = [answer async for answer in answers]
    assert [answer.infer_response.id for answer in told] == ["0", "1", "2"]
    assert [answer.error_message for answer in told] == ["", "no room", ""]
    assert list(told[2].infer_response.raw_output_contents) == [b"\2"]


@within_limit
async def test_a_stream_is_read_no_further_than_its_limit():
    link = FakeLink()
    async with serving(link) as (_, _, address), grpc.aio.insecure_channel(address) as channel:
        stub = triton.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        count = STREAM_REQUESTS + 5
        answers = stub.ModelStreamInfer(requests(*(message(1, request_id=str(number)) for number in range(count))))
        await link.held(STREAM_REQUESTS)
        assert (await stub.ServerLive(service_pb2.ServerLiveRequest())).live  # it has had time to read on
        assert len(link.calls) == STREAM_REQUESTS
        for number in range(count):
            (await link.held(number + 1)).answered.set_result(None)
        assert [answer.infer_response.id async for answer in answers] == [str(number) for number in range(count)]


@within_limit
async def test_a_client_that_leaves_a_stream_ends_its_requests():
    link = FakeLink()
    async with serving(link) as (_, _, address), grpc.aio.insecure_channel(address) as channel:
        stub = triton.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answers = stub.ModelStreamInfer(requests(message(1), message(2)))
        await link.held(2)
        answers.cancel()
        for call in link.calls:
            await call.cancelled.wait()


@within_limit
async def test_stopping_answers_what_streams_have_brought_and_ends_idle_ones():
    link = FakeLink()
    async with serving(link) as (front, _, address), grpc.aio.insecure_channel(address) as channel:
        stub = triton.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        busy, idle = stub.ModelStreamInfer(), stub.ModelStreamInfer()
        await busy.write(message(7))
        call = await link.held(1)
        await idle.write(message(8))
        (await link.held(2)).answered.set_result(None)
        assert (await idle.read()).error_message == ""
        stopped = asyncio.ensure_future(front.stop(WAIT_S))
        assert await idle.code() is grpc.StatusCode.UNAVAILABLE
        assert not stopped.done()
        call.answered.set_result(None)
        assert list((await busy.read()).infer_response.raw_output_contents) == [b"\7"]
        assert await busy.code() is grpc.StatusCode.UNAVAILABLE
        await stopped


@within_limit
async def test_calls_that_are_not_authorized_are_turned_away_but_for_health():
    link = FakeLink(at_once=True)
    async with (
        serving(link, authorize=lambda given: given == "Bearer secret") as (_, _, address),
        triton.InferenceServerClient(address) as client,
    ):
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("served")
        for headers in ({}, {"authorization": "Bearer other"}):
            with pytest.raises(triton.InferenceServerException, match="UNAUTHENTICATED"):
                await client.infer("served", infer_input(1), headers=headers)
            with pytest.raises(triton.InferenceServerException, match="UNAUTHENTICATED"):
                await client.get_server_metadata(headers=headers)
        assert link.calls == []
        await client.infer("served", infer_input(1), headers={"authorization": "Bearer secret"})


def chain_of(certificate):
    return b"".join(blob.bytes() for blob in certificate.cert_chain_pems)


def credentials(authority, certificate=None):
    key, chain = (certificate.private_key_pem.bytes(), chain_of(certificate)) if certificate else (None, None)
    return grpc.ssl_channel_credentials(authority.cert_pem.bytes(), key, chain)


@within_limit
async def test_with_tls_only_clients_of_the_authority_are_let_in():
    ours, theirs, others = (trustme.CA() for _ in range(3))
    server = ours.issue_cert("localhost")
    tls = TlsFiles(
        key=server.private_key_pem.bytes(),
        certificates=chain_of(server),
        client_authority=theirs.cert_pem.bytes(),
    )
    async with serving(FakeLink(at_once=True), tls=tls) as (_, _, address):
        port = address.partition(":")[2]
        known = credentials(ours, theirs.issue_cert("client@example.org"))
        async with triton.InferenceServerClient(f"localhost:{port}", creds=known) as client:
            assert await client.is_server_live()
        for unknown in (credentials(ours), credentials(ours, others.issue_cert("client@example.org"))):
            async with triton.InferenceServerClient(f"localhost:{port}", creds=unknown) as client:
                with pytest.raises(triton.InferenceServerException, match="UNAVAILABLE"):
                    await client.is_server_live()


@within_limit
async def test_a_region_is_registered_for_a_client_when_all_frontends_have_it():
    async with (
        serving(FakeLink(), offered=True) as (_, regions, address),
        triton.InferenceServerClient(address) as client,
    ):
        words = asyncio.Queue()
        regions.send = words.put_nowait
        asked = asyncio.ensure_future(client.register_system_shared_memory("r", "/k", 8, offset=4))
        word = await words.get()
        assert (word.spec.name, word.spec.key, word.spec.offset, word.spec.byte_size) == ("r", "/k", 4, 8)
        assert not asked.done()
        regions.heard(RegionsChanged(word.number, None))
        await asked


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda client: client.register_cuda_shared_memory("r", b"x" * 64, 0, 8), "takes no CUDA memory"),
        (lambda client: client.register_system_shared_memory("r", "/k", 8), "--system-shared-memory"),
    ],
    ids=["CUDA memory", "system memory"],
)
@within_limit
async def test_what_is_not_offered_says_so(ask, words):
    async with serving(FakeLink()) as (_, _, address), triton.InferenceServerClient(address) as client:
        with pytest.raises(triton.InferenceServerException, match=words) as caught:
            await ask(client)
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


@pytest.mark.parametrize("verb", ["load", "unload"])
@within_limit
async def test_models_are_changed_only_where_the_server_was_started_so(verb):
    async with serving(FakeLink()) as (_, _, address), triton.InferenceServerClient(address) as client:
        with pytest.raises(triton.InferenceServerException, match="--model-control explicit") as caught:
            await getattr(client, f"{verb}_model")("served")
        assert caught.value.status() == "StatusCode.PERMISSION_DENIED"


@within_limit
async def test_what_perf_analyzer_begins_with_is_answered_also_without_shared_memory():
    async with serving(FakeLink()) as (_, _, address), triton.InferenceServerClient(address) as client:
        await client.unregister_system_shared_memory()
        await client.unregister_cuda_shared_memory()
        assert not (await client.get_system_shared_memory_status()).regions
        assert not (await client.get_cuda_shared_memory_status()).regions
        assert "system_shared_memory" not in (await client.get_server_metadata()).extensions
