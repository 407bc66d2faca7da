"""The generator's HTTP over TLS: as over plain sockets, each request ends once, whatever comes in between."""

import os
import socket
import ssl
from dataclasses import replace

import pytest

from headrace.config import LoadConfig
from headrace.errors import Unreachable
from headrace.target.access import Access
from headrace.target.http_load import HttpLoad
from headrace.target.recorder import OK, UNANSWERED
from tests.target.certificates import Certificates
from tests.target.test_http_load import CHUNKED, CLOSING, GOOD, Answering, answering, burst, sent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def access(made):
    return Access(encrypted=True, ca_file=made.ca)


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize("answer", [GOOD, CHUNKED, CLOSING], ids=["length", "chunked", "closing"])
def test_answers_come_whole_in_whatever_form(made, access, answer, newest):
    """Also over connections that are made while requests are under way, which "closing" needs for each."""
    with answering(answer, context=made.context(newest=newest)) as port:
        sending, _ = sent(port, burst(40), access=access)
    assert sending.recorder.statuses(40).tolist() == [OK] * 40
    wrong, tally = sending._answers.finish(sending.recorder.answers(40))
    assert not wrong.any()
    assert tally.rows == 40


@pytest.mark.parametrize("size", [16_000, 16_384, 40_000, 20_000_000])
def test_bodies_are_sent_whole_in_as_many_records_as_they_need(made, access, size):
    with answering(GOOD, context=made.context()) as port:
        sending, _ = sent(port, burst(3), body=b"{}" + bytes(size), access=access)
    assert sending.recorder.statuses(3).tolist() == [OK] * 3


def test_a_long_answer_comes_whole(made, access):
    long = b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000)
    with answering(long, context=made.context()) as port:
        sending, _ = sent(port, burst(2), access=access)
    assert sending.recorder.statuses(2).tolist() == [OK] * 2


def test_a_head_may_be_longer_than_a_record(made, access):
    with answering(GOOD, context=made.context()) as port:
        sending, _ = sent(port, burst(2), access=replace(access, token="t" * 20_000))
    assert sending.recorder.statuses(2).tolist() == [OK] * 2


def test_a_lost_connection_is_a_request_without_an_answer_and_the_rest_go_on(made, access):
    with answering(GOOD, None, context=made.context()) as port:
        sending, _ = sent(port, LoadConfig(kind="closed", concurrency=1, num_iters=6), access=access)
    assert sending.recorder.statuses(6).tolist() == [OK, UNANSWERED] * 3
    assert sending.first_error == "connection closed by the server"


def test_what_is_no_http_is_named(made, access):
    with answering(b"SSH-2.0-OpenSSH\r\n\r\n", context=made.context()) as port:
        sending, _ = sent(port, burst(1), access=access)
    assert sending.recorder.statuses(1).tolist() == [UNANSWERED]
    assert "no HTTP" in sending.first_error


def test_a_request_is_given_up_when_its_time_is_up(made, access):
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n...", context=made.context()) as port:
        sending, _ = sent(port, burst(2), timeout_s=0.3, access=access)
    assert sending.recorder.statuses(2).tolist() == [UNANSWERED] * 2
    assert sending.first_error == "no answer within 0.3 s"


def test_a_server_of_another_authority_is_found_before_the_clock_starts(made):
    with answering(GOOD, context=made.context()) as port, pytest.raises(Unreachable, match="another authority's"):
        sent(port, burst(1), access=Access(encrypted=True, ca_file=made.other_ca))


def test_a_certificate_that_changes_during_a_run_is_named_and_no_request_is_left_waiting(made, access, monkeypatch):
    server = Answering([GOOD, None], reads_body=True, context=made.context())
    real_open = HttpLoad.open

    def open_and_change(load):
        real_open(load)
        server._context = made.context(made.expired)

    monkeypatch.setattr(HttpLoad, "open", open_and_change)
    load = LoadConfig(kind="closed", concurrency=1, num_iters=4)
    sending, _ = sent(server.listener.getsockname()[1], load, access=access)
    server.listener.close()
    assert sending.recorder.statuses(4).tolist() == [OK, UNANSWERED, UNANSWERED, UNANSWERED]
    assert sending.issued == sending.ended == 4


def test_data_that_is_no_tls_breaks_the_connection_and_says_so(made, access):
    """A peer that falls out of TLS after the handshake."""

    class FallingOut(Answering):
        def _serve(self, peer):
            encrypted = made.context().wrap_socket(peer, server_side=True)
            with encrypted, encrypted.makefile("rb") as file:
                size = self._body_bytes(file)
                if not size:
                    return
                file.read(size)
                with socket.socket(fileno=os.dup(encrypted.fileno())) as beneath:
                    beneath.sendall(GOOD)

    server = FallingOut([], reads_body=True)
    sending, _ = sent(server.listener.getsockname()[1], burst(1), access=access)
    server.listener.close()
    assert sending.recorder.statuses(1).tolist() == [UNANSWERED]
    assert "TLS" in sending.first_error
