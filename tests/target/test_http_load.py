"""The generator's HTTP: whatever a server does with the connection, each request ends once, and is named."""

import contextlib
import itertools
import socket
import threading

import msgspec
import numpy as np
import pytest

from headrace.clock import now_ns
from headrace.config import LoadConfig, TargetConfig
from headrace.errors import Unreachable
from headrace.target import http_load
from headrace.target.access import Access
from headrace.target.counters import shared_words, words_of
from headrace.target.expected import Expected
from headrace.target.http_load import HttpLoad
from headrace.target.kept import KeptAnswers
from headrace.target.payloads import Bodies
from headrace.target.recorder import ERROR, OK, SHED, UNANSWERED
from headrace.target.sending import GeneratorJob, Sending
from headrace.wire.v2_call import decode_answer

PLAIN = Access()
VALUES = np.array([[1.0, 2.0]], dtype=np.float32)
JSON = msgspec.json.encode(
    {
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": VALUES.nbytes}},
        ]
    }
)
BODY = JSON + VALUES.tobytes()
LENGTH = b"Inference-Header-Content-Length: %d\r\n" % len(JSON)
GOOD = b"HTTP/1.1 200 OK\r\n" + LENGTH + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
    + LENGTH
    + b"\r\n5\r\n"
    + BODY[:5]
    + b"\r\n%x\r\n" % len(BODY[5:])
    + BODY[5:]
    + b"\r\n0\r\n\r\n"
)
CLOSING = GOOD.replace(b"Content-Length", b"Connection: close\r\nContent-Length", 2).replace(
    b"Inference-Header-Connection: close\r\n", b"Inference-Header-"
)
FULL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nfull"
BROKEN = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\noops"


class Answering:
    """A server that answers with these in turn, whatever the connection; None closes it."""

    def __init__(self, answers, reads_body, context=None):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self._answers = itertools.cycle(answers)
        self._reads_body = reads_body
        self._context = context
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self.listener.accept()[:1], daemon=True).start()

    def _serve(self, peer):
        if self._context is not None:
            try:
                peer = self._context.wrap_socket(peer, server_side=True)
            except OSError:
                peer.close()
                return
        with peer, peer.makefile("rb") as file, contextlib.suppress(OSError):
            while size := self._body_bytes(file):
                file.read(size if self._reads_body else 0)
                answer = next(self._answers)
                if answer is None:
                    return
                for at in range(0, len(answer), 50):  # in pieces
                    peer.sendall(answer[at : at + 50])
                if b"Connection: close" in answer or not self._reads_body:
                    return

    def _body_bytes(self, file):
        """Read a request's head; return how long its body is, 0 at the end of the connection."""
        size = 0
        for line in iter(file.readline, b""):
            if line == b"\r\n":
                return size
            name, _, value = line.partition(b": ")
            size = int(value) if name == b"Content-Length" else size
        return 0


@contextlib.contextmanager
def answering(*answers, reads_body=True, context=None):
    server = Answering(answers, reads_body, context)
    try:
        yield server.listener.getsockname()[1]
    finally:
        server.listener.close()


def sent(port, load, *, body=b"{}1234", connections=8, timeout_s=20.0, access=PLAIN):
    bodies = Bodies([(body, 2)])
    job = GeneratorJob(
        number=0,
        url=f"https://localhost:{port}" if access.encrypted else f"http://127.0.0.1:{port}",
        target=TargetConfig(url="http://x", model="m", connections=connections, request_timeout_s=timeout_s),
        load=load,
        bodies_path=bodies.path,
        places=bodies.places,
        expected=None,
        output=None,
        report=None,
        counters=shared_words(1),
        access=access,
    )
    sending = Sending(job, KeptAnswers(Expected([{"y": VALUES}]), decode_answer), words_of(job.counters, 0))
    generator = HttpLoad(job, sending)
    try:
        generator.open()
        generator.run(now_ns())
    finally:
        generator.close()
        bodies.close()
    return sending, generator


def burst(count):
    return LoadConfig(kind="burst", num_iters=count)


@pytest.mark.parametrize("answer", [GOOD, CHUNKED, CLOSING], ids=["length", "chunked", "closing"])
def test_answers_come_whole_in_whatever_form(answer):
    with answering(answer) as port:
        sending, _ = sent(port, burst(40))
    assert sending.recorder.statuses(40).tolist() == [OK] * 40
    wrong, tally = sending._answers.finish(sending.recorder.answers(40))
    assert not wrong.any()
    assert tally.rows == 40


def test_connections_are_kept_and_not_more_than_allowed():
    with answering(GOOD) as port:
        sending, generator = sent(port, burst(100), connections=3)
    assert generator.most_connections == 3
    assert sending.recorder.statuses(100).tolist() == [OK] * 100


def test_refusals_and_errors_are_told_apart():
    with answering(GOOD, FULL, BROKEN) as port:
        sending, _ = sent(port, LoadConfig(kind="closed", concurrency=1, num_iters=9))
    assert sending.recorder.statuses(9).tolist() == [OK, SHED, ERROR] * 3
    assert sending.first_error == "status 500: oops"


def test_a_token_is_sent_and_what_a_server_repeats_of_it_is_not():
    """Not even in part, where it lies across the end of what is shown."""
    token = "s3cret" * 30
    said = b"x" * 100 + f"Bearer {token} is not known".encode()
    refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said)
    with answering(refusal) as port:
        sending, generator = sent(port, burst(2), access=Access(token=token))
    assert f"authorization: Bearer {token}\r\n".encode() in generator._heads[0]
    assert sending.first_error == "status 403: " + "x" * 100 + "Bearer (token) is not known"
    assert "s3cret" not in repr(Access(token=token))


def test_a_lost_connection_is_a_request_without_an_answer_and_the_rest_go_on():
    with answering(GOOD, None) as port:
        sending, _ = sent(port, LoadConfig(kind="closed", concurrency=1, num_iters=6))
    assert sending.recorder.statuses(6).tolist() == [OK, UNANSWERED] * 3
    assert sending.first_error == "connection closed by the server"


def test_a_refusal_before_the_body_was_read_counts_as_one():
    with answering(FULL, reads_body=False) as port:
        sending, _ = sent(port, burst(2), body=b"{}" + bytes(20_000_000))
    assert set(sending.recorder.statuses(2).tolist()) <= {SHED, UNANSWERED}, "the reset may overtake the answer"


def test_large_bodies_are_sent_whole():
    with answering(GOOD) as port:
        sending, _ = sent(port, burst(3), body=b"{}" + bytes(20_000_000))
    assert sending.recorder.statuses(3).tolist() == [OK] * 3


def test_what_is_no_http_is_named():
    with answering(b"SSH-2.0-OpenSSH\r\n\r\n") as port:
        sending, _ = sent(port, burst(1))
    assert sending.recorder.statuses(1).tolist() == [UNANSWERED]
    assert "no HTTP" in sending.first_error


def test_a_request_is_given_up_when_its_time_is_up():
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n...") as port:
        sending, _ = sent(port, burst(2), timeout_s=0.3)
    assert sending.recorder.statuses(2).tolist() == [UNANSWERED] * 2
    assert sending.first_error == "no answer within 0.3 s"


def test_no_server_is_found_before_the_clock_starts():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(Unreachable):
        sent(port, burst(1))


def test_a_server_that_goes_leaves_no_request_waiting():
    with answering(None) as port:
        sending, _ = sent(port, burst(30), connections=2)
    assert sending.recorder.statuses(30).tolist() == [UNANSWERED] * 30


@pytest.mark.parametrize("count", [50, 3000])
def test_a_closed_loop_whose_server_goes_comes_to_its_end(monkeypatch, count):
    """However many requests are left: each fails at once, and makes the next one due."""
    monkeypatch.setattr(http_load, "RETRY_S", 0)
    server = Answering([GOOD, None], reads_body=True)
    port = server.listener.getsockname()[1]
    real_open = HttpLoad.open

    def open_and_go(load):
        real_open(load)
        server.listener.close()

    monkeypatch.setattr(HttpLoad, "open", open_and_go)
    sending, _ = sent(port, LoadConfig(kind="closed", concurrency=2, num_iters=count))
    statuses = sending.recorder.statuses(count).tolist()
    assert sending.issued == sending.ended == count
    assert statuses.count(UNANSWERED) > count - 10
