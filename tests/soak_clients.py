"""Clients of all kinds for a soak: good, bad, slow and vanishing ones. Each act checks what it is told."""

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import shared_memory

from headrace import Client
from headrace.door_messages import LENGTH, door_of, socket_address

WAIT_S = 60
VALUES, IDS, TIMES = 256, 4, 128  # numbers of a row; how often `wide` holds them
SLOW_ID = 77  # has the model take its time
GATE_ID = 78  # has the model wait until somebody opens the gate and closes it
MOST_ROWS = 4
MAX_BODY_BYTES = 1 << 20
HEADER_TIMEOUT_S, BODY_TIMEOUT_S = 1, 2
PATH = "/v2/models/served/infer"
MODEL = f"""
import os
import time
import torch

class Model(torch.nn.Module):
    def forward(self, values, ids):
        if (ids == {SLOW_ID}).any():
            time.sleep(0.02)
        if (ids == {GATE_ID}).any():
            with open(os.environ["GATE"]) as gate:
                gate.read()
        return {{"doubled": values * 2, "sum": ids.sum(1), "wide": values.repeat(1, {TIMES})}}

def build():
    return Model()

def example_inputs():
    return {{"values": torch.zeros(2, {VALUES}), "ids": torch.zeros(2, {IDS}, dtype=torch.int64)}}
"""
_RING_CLIENT = f"""
import sys
import numpy as np
from headrace import Client

inputs = {{"values": np.zeros((1, {VALUES}), np.float32), "ids": np.full((1, {IDS}), {SLOW_ID})}}
client = Client(sys.argv[1], ring_rows={MOST_ROWS}, timeout={WAIT_S})
while True:
    client.infer("served", inputs)
    assert client.transport == "ring"
    print("answered", flush=True)
"""


class Inputs:
    """One request's tensors, and what the model makes of them."""

    def __init__(self, random, *, rows=None):
        generator = np.random.default_rng(random.getrandbits(32))
        self.rows = rows or random.randint(1, MOST_ROWS)
        self.values = generator.standard_normal((self.rows, VALUES)).astype(np.float32)
        self.ids = generator.integers(100, 1000, (self.rows, IDS))

    def by_name(self):
        return {"values": self.values, "ids": self.ids}

    def check(self, doubled, total, wide=None):
        np.testing.assert_array_equal(np.asarray(doubled).reshape(self.rows, VALUES), self.values * 2)
        np.testing.assert_array_equal(np.asarray(total).reshape(self.rows), self.ids.sum(1))
        if wide is not None:
            np.testing.assert_array_equal(np.asarray(wide).reshape(self.rows, -1), np.tile(self.values, TIMES))


def request_head(body_bytes, *headers):
    lines = [f"POST {PATH} HTTP/1.1", "Host: localhost", f"Content-Length: {body_bytes}", *headers, "\r\n"]
    return "\r\n".join(lines).encode()


def json_request(inputs, *, outputs=("doubled", "sum")):
    told = {
        "inputs": [
            {"name": "values", "shape": [inputs.rows, VALUES], "datatype": "FP32", "data": inputs.values.tolist()},
            {"name": "ids", "shape": [inputs.rows, IDS], "datatype": "INT64", "data": inputs.ids.tolist()},
        ],
        "outputs": [{"name": name} for name in outputs],
    }
    body = json.dumps(told).encode()
    return request_head(len(body)) + body


def binary_request(inputs, *, outputs=("doubled", "sum", "wide"), sizes=None):
    tensors = [inputs.values, inputs.ids]
    datatypes = {"values": "FP32", "ids": "INT64"}
    told = {
        "inputs": [
            {
                "name": name,
                "shape": list(tensor.shape),
                "datatype": datatypes[name],
                "parameters": {"binary_data_size": size},
            }
            for name, tensor, size in zip(
                datatypes, tensors, sizes or [tensor.nbytes for tensor in tensors], strict=True
            )
        ],
        "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
    }
    head = json.dumps(told).encode()
    body = head + b"".join(tensor.tobytes() for tensor in tensors)
    return request_head(len(body), f"Inference-Header-Content-Length: {len(head)}") + body


def read_answer(connection, *, piece=65536):
    """Return an answer's status, head and body, read in pieces of so many bytes at most."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = connection.recv(piece)
        assert data, f"the server closed the connection after {received!r}"
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    missing = int(fields[b"content-length"]) - len(body)
    pieces = [body]
    while missing:
        data = connection.recv(min(piece, missing))
        assert data, "the server closed the connection within an answer"
        pieces.append(data)
        missing -= len(data)
    return int(head[9:12]), fields, b"".join(pieces)


def binary_outputs(fields, body):
    size = int(fields[b"inference-header-content-length"])
    outputs, at = {}, size
    dtypes = {"FP32": np.float32, "INT64": np.int64}
    for tensor in json.loads(body[:size])["outputs"]:
        end = at + tensor["parameters"]["binary_data_size"]
        outputs[tensor["name"]] = np.frombuffer(body[at:end], dtypes[tensor["datatype"]])
        at = end
    assert at == len(body)
    return outputs


def connect(server, receive_bytes=None):
    host, port = server.address.split(":")
    connection = socket.socket()
    connection.settimeout(WAIT_S)
    if receive_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def check_binary(inputs, answer):
    status, fields, body = answer
    assert status == 200, body
    outputs = binary_outputs(fields, body)
    inputs.check(outputs["doubled"], outputs["sum"], outputs["wide"])


class Visitor:
    """Acts of one thread. Those that keep connections open keep them until `close`."""

    def __init__(self, server, number, random):
        self.server = server
        self.random = random
        self.host, port = server.address.split(":")
        self.port = int(port)
        self.url = f"http://{server.address}"
        self._channel = grpc.insecure_channel(server.grpc_address, [("grpc.use_local_subchannel_pool", 1)])
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._kept: socket.socket | None = None
        self._clients = [Client(self.url, timeout=WAIT_S, ring_rows=16), Client(self.url, timeout=WAIT_S, ring="off")]
        self._region = f"soak-{os.getpid()}-{number}"
        self._memory = shared_memory.create_shared_memory_region(self._region, self._region, 1 << 20)
        self._is_registered = False

    def close(self):
        if self._is_registered:
            self.stub.SystemSharedMemoryUnregister(
                pb.SystemSharedMemoryUnregisterRequest(name=self._region), timeout=WAIT_S
            )
        shared_memory.destroy_shared_memory_region(self._memory)
        for client in self._clients:
            client.close()
        if self._kept is not None:
            self._kept.close()
        self._channel.close()

    def connect(self, receive_bytes=None):
        return connect(self.server, receive_bytes)

    @property
    def kept(self):
        """A connection for one request after another."""
        if self._kept is None:
            self._kept = self.connect()
        return self._kept

    def inputs(self):
        return Inputs(self.random)

    def slow_inputs(self):
        inputs = Inputs(self.random, rows=1)
        inputs.ids[:] = SLOW_ID
        return inputs

    # Good ones.

    def json(self):
        inputs = self.inputs()
        self.kept.sendall(json_request(inputs))
        status, _, body = read_answer(self.kept)
        assert status == 200, body
        inputs.check(*(output["data"] for output in json.loads(body)["outputs"]))

    def binary(self):
        inputs = self.inputs()
        self.kept.sendall(binary_request(inputs))
        check_binary(inputs, read_answer(self.kept))

    def pipelined(self):
        several = [self.inputs() for _ in range(3)]
        with self.connect() as connection:
            connection.sendall(b"".join(map(binary_request, several)))
            for inputs in several:
                check_binary(inputs, read_answer(connection))

    def grpc(self):
        inputs = self.inputs()
        told = self.stub.ModelInfer(self.grpc_request(inputs), timeout=WAIT_S)
        doubled, total, wide = told.raw_output_contents
        inputs.check(
            np.frombuffer(doubled, np.float32), np.frombuffer(total, np.int64), np.frombuffer(wide, np.float32)
        )

    def grpc_stream(self):
        several = [self.inputs() for _ in range(3)]
        answers = self.stub.ModelStreamInfer(iter([self.grpc_request(inputs) for inputs in several]), timeout=WAIT_S)
        for inputs, told in zip(several, answers, strict=True):
            assert not told.error_message
            doubled, total, _ = told.infer_response.raw_output_contents
            inputs.check(np.frombuffer(doubled, np.float32), np.frombuffer(total, np.int64))

    def shared_memory(self):
        inputs = self.inputs()
        if not self._is_registered:
            asked = pb.SystemSharedMemoryRegisterRequest(name=self._region, key=f"/{self._region}", byte_size=1 << 20)
            self.stub.SystemSharedMemoryRegister(asked, timeout=WAIT_S)
            self._is_registered = True
        shared_memory.set_shared_memory_region(self._memory, [inputs.values, inputs.ids])
        at = inputs.values.nbytes + inputs.ids.nbytes
        request = pb.ModelInferRequest(model_name="served")
        for name, datatype, tensor, offset in (
            ("values", "FP32", inputs.values, 0),
            ("ids", "INT64", inputs.ids, inputs.values.nbytes),
        ):
            asked = request.inputs.add(name=name, datatype=datatype, shape=tensor.shape)
            self._put(asked, offset, tensor.nbytes)
        self._put(request.outputs.add(name="doubled"), at, inputs.values.nbytes)
        request.outputs.add(name="sum")
        told = self.stub.ModelInfer(request, timeout=WAIT_S)
        doubled = shared_memory.get_contents_as_numpy(self._memory, np.float32, [inputs.rows, VALUES], offset=at)
        inputs.check(doubled, np.frombuffer(told.raw_output_contents[1], np.int64))

    def _put(self, tensor, offset, size):
        tensor.parameters["shared_memory_region"].string_param = self._region
        tensor.parameters["shared_memory_offset"].int64_param = offset
        tensor.parameters["shared_memory_byte_size"].int64_param = size

    def client(self):
        for client, transport in zip(self._clients, ("ring", "http"), strict=True):
            inputs = self.inputs()
            told = client.infer("served", inputs.by_name())
            inputs.check(told["doubled"], told["sum"], told["wide"])
            assert client.transport == transport

    def grpc_request(self, inputs):
        request = pb.ModelInferRequest(model_name="served")
        request.inputs.add(name="values", datatype="FP32", shape=inputs.values.shape)
        request.inputs.add(name="ids", datatype="INT64", shape=inputs.ids.shape)
        request.raw_input_contents.extend([inputs.values.tobytes(), inputs.ids.tobytes()])
        return request

    # Bad ones: each is refused for what it is, and with no internal error.

    def _refused(self, data, *statuses):
        with self.connect() as connection:
            with suppress(ConnectionError):  # it is refused before all of it is sent
                connection.sendall(data)
            status, _, body = read_answer(connection)
            assert status in statuses, (status, body)
            assert json.loads(body)["error"]

    def malformed_head(self):
        self._refused(
            self.random.choice(
                [
                    b"\r\nnonsense\r\n\r\n",
                    b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
                    b"GET / HTTP/1.1\r\n\r\n",
                    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
                    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
                ]
            ),
            400,
        )

    def long_head(self):
        self._refused(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000, 431)

    def garbage(self):
        data = self.random.randbytes(self.random.randint(1, 2000)) + b"\r\n\r\n"
        with self.connect() as connection, suppress(ConnectionError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while answer := connection.recv(65536):
                assert not answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 5"))

    def garbage_at_the_grpc_port(self):
        host, port = self.server.grpc_address.split(":")
        with socket.create_connection((host, int(port)), WAIT_S) as connection, suppress(ConnectionError):
            connection.sendall(self.random.randbytes(3000))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    def garbage_at_the_door(self):
        said = self.random.choice([b'{"model": "\xff"}', b"[" * 4000, b'{"rows": -1}', self.random.randbytes(64)])
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(WAIT_S)
            connection.connect(socket_address(door_of(self.host, self.port)))
            connection.sendall(LENGTH.pack(len(said)) + said)
            connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                while connection.recv(65536):
                    pass

    def bad_json(self):
        good = json_request(Inputs(self.random, rows=1))
        _, _, body = good.partition(b"\r\n\r\n")
        cut = self.random.randrange(len(body))
        body = body[:cut] + self.random.choice([b"", b"\xff", b"]", b'"', b"\0"])
        self._refused(request_head(len(body)) + body, 400)

    def wrong_tensors(self):
        inputs = self.inputs()
        wrong = self.random.choice([(VALUES + 1, np.float32), (VALUES, np.float64), (VALUES - 1, np.float32)])
        inputs.values = np.zeros((inputs.rows, wrong[0]), wrong[1])
        self._refused(binary_request(inputs), 400)

    def wrong_sizes(self):
        inputs = self.inputs()
        sizes = self.random.choice([(8, inputs.ids.nbytes), (-1, 0), (inputs.values.nbytes, 2**63), ("a", None)])
        self._refused(binary_request(inputs, sizes=sizes), 400)

    def too_many_rows(self):
        self._refused(json_request(Inputs(self.random, rows=MOST_ROWS + 1)), 400)

    def oversized(self):
        self._refused(request_head(self.random.choice([MAX_BODY_BYTES + 1, 10**17])), 413)

    def oversized_chunks(self):
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        self._refused(head + chunk * (MAX_BODY_BYTES // 0x10000 + 1), 413)

    def bad_grpc(self):
        inputs = self.inputs()
        wrong = self.grpc_request(inputs)
        wrong.inputs[0].shape[1] += 1
        short = self.grpc_request(inputs)
        short.raw_input_contents[0] = b"1234"
        raw = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for request in (wrong.SerializeToString(), short.SerializeToString(), b"\xff" + self.random.randbytes(99)):
            code = self._code_of(raw, request)
            assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), code
        assert self._code_of(raw, bytes(MAX_BODY_BYTES + 1)) is grpc.StatusCode.RESOURCE_EXHAUSTED

    @staticmethod
    def _code_of(call, request):
        try:
            call(request, timeout=WAIT_S)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    # Slow ones: those that get there are answered, and those that do not are told, or cut off.

    def dribbled(self):
        inputs = Inputs(self.random, rows=1)
        data = self.random.choice([json_request, binary_request])(inputs, outputs=("doubled", "sum"))
        with self.connect() as connection:
            at = 0
            while at < len(data):
                size = 1 if at < 200 else self.random.randint(1, 200)
                connection.sendall(data[at : at + size])
                at += size
            status, _, body = read_answer(connection)
            assert status == 200, body

    def read_slowly(self):
        inputs = Inputs(self.random, rows=MOST_ROWS)
        with self.connect(receive_bytes=4096) as connection:
            connection.sendall(binary_request(inputs))
            check_binary(inputs, read_answer(connection, piece=512))

    def stalled_head(self):
        self._stalled(json_request(self.inputs())[:40])

    def stalled_body(self):
        data = binary_request(self.inputs())
        self._stalled(data[: -self.random.randint(1, 1000)])

    def _stalled(self, data):
        self._refused(data, 408)

    def never_read(self):
        """Ask for more than the kernel's buffers take, and read none of it: after a while the server lets go."""
        requests = b"".join(binary_request(Inputs(self.random, rows=MOST_ROWS)) for _ in range(20))
        with self.connect(receive_bytes=4096) as connection:
            with suppress(ConnectionError):  # it is cut off
                connection.sendall(requests)
            ended = select.poll()
            ended.register(connection, select.POLLRDHUP)
            assert ended.poll(1000 * WAIT_S)

    # Vanishing ones.

    def _leave(self, connection):
        if self.random.random() < 0.5:  # a reset instead of an end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def leave_in_head(self):
        connection = self.connect()
        connection.sendall(json_request(self.inputs())[: self.random.randint(0, 60)])
        self._leave(connection)

    def leave_in_body(self):
        connection = self.connect()
        data = binary_request(self.inputs())
        connection.sendall(data[: self.random.randint(200, len(data) - 1)])
        self._leave(connection)

    def leave_while_computing(self):
        connection = self.connect()
        connection.sendall(binary_request(self.slow_inputs()))
        self._leave(connection)

    def leave_in_answer(self):
        connection = self.connect(receive_bytes=4096)
        connection.sendall(binary_request(Inputs(self.random, rows=MOST_ROWS)))
        connection.recv(self.random.randint(1, 3000))
        self._leave(connection)

    def cancel_grpc(self):
        call = self.stub.ModelInfer.future(self.grpc_request(self.slow_inputs()))
        if self.random.random() < 0.5:
            call.cancel()
            return
        stream = self.stub.ModelStreamInfer(iter([self.grpc_request(self.slow_inputs())] * 3), timeout=WAIT_S)
        next(stream)
        stream.cancel()
        call.cancel()

    def killed_ring_client(self):
        process = subprocess.Popen([sys.executable, "-c", _RING_CLIENT, self.url], stdout=subprocess.PIPE, text=True)
        for _ in range(self.random.randint(1, 5)):
            assert process.stdout.readline() == "answered\n"
        process.send_signal(signal.SIGKILL)
        process.wait(WAIT_S)
        process.stdout.close()


GOOD = ("json", "binary", "pipelined", "grpc", "grpc_stream", "shared_memory", "client")
BAD = (
    *("malformed_head", "long_head", "garbage", "garbage_at_the_grpc_port", "garbage_at_the_door", "bad_json"),
    *("wrong_tensors", "wrong_sizes", "too_many_rows", "oversized", "oversized_chunks", "bad_grpc"),
)
SLOW = ("dribbled", "read_slowly", "stalled_head", "stalled_body", "never_read")
VANISHING = ("leave_in_head", "leave_in_body", "leave_while_computing", "leave_in_answer", "cancel_grpc")
KILLED = ("killed_ring_client",)
