"""Heads: what is understood, and what is refused because two readers could take it for two things."""

import pytest

from headrace.errors import InvalidRequest
from headrace.frontend.http.head import Refused, header_number, parse_head


def head(*lines):
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def test_a_head_is_read():
    found = parse_head(head("POST /a%20b?c=d HTTP/1.1", "Host: x", "Content-Length: 5", "X-A: 1", "x-a:  2 "))
    assert (found.method, found.path, found.length) == ("POST", "/a%20b", 5)
    assert found.headers["x-a"] == "1, 2"
    assert found.keep_alive
    assert not found.expects_continue


@pytest.mark.parametrize(
    ("lines", "field", "value"),
    [
        (["GET http://h/p HTTP/1.1", "Host: h"], "path", "/p"),
        (["OPTIONS * HTTP/1.1", "Host: h"], "path", "*"),
        (["GET / HTTP/1.1", "Host: h"], "length", 0),
        (["POST / HTTP/1.1", "Host: h", "Transfer-Encoding: Chunked"], "length", None),
        (["GET / HTTP/1.1", "Host: h", "Connection: close"], "keep_alive", False),
        (["GET / HTTP/1.0"], "keep_alive", False),
        (["GET / HTTP/1.0", "Connection: keep-alive"], "keep_alive", True),
        (["GET / HTTP/1.1", "Host: h", "Connection: Upgrade", "Upgrade: h2c"], "method", "GET"),
        (["PUT / HTTP/1.1", "Host: h", "Content-Length: 1", "Expect: 100-Continue"], "expects_continue", True),
        (["PUT / HTTP/1.1", "Host: h", "Content-Length: 0", "Expect: 100-continue"], "expects_continue", False),
    ],
)
def test_forms_that_clients_use(lines, field, value):
    assert getattr(parse_head(head(*lines)), field) == value


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["GET / HTTP/1.1"], 400),
        (["GET / HTTP/1.1", "Host: a", "Host: b"], 400),
        (["GET / HTTP/2.0", "Host: a"], 505),
        (["GET / HTTP/0.9", "Host: a"], 505),
        (["NONSENSE / HTTP/1.1", "Host: a"], 400),
        (["GET / HTTP/1.1", "Host : a"], 400),
        (["GET / HTTP/1.1", "Host: a", " folded"], 400),
        (["GET / HTTP/1.1", "Host: a", "X: \x00"], 400),
        (["GET / HTTP/1.1", "Host: a", "X: a\nContent-Length: 3"], 400),
        (["POST / HTTP/1.1", "Host: a", "Content-Length: 5", "Content-Length: 5"], 400),
        (["POST / HTTP/1.1", "Host: a", "Content-Length: 5, 5"], 400),
        (["POST / HTTP/1.1", "Host: a", "Content-Length: +5"], 400),
        (["POST / HTTP/1.1", "Host: a", "Content-Length: 0x5"], 400),
        (["POST / HTTP/1.1", "Host: a", "Content-Length:"], 400),
        (["POST / HTTP/1.1", "Host: a", "Content-Length: 9999999999999999999"], 400),
        (["POST / HTTP/1.1", "Host: a", "Content-Length: 99999999999999999999999"], 400),
        (["POST / HTTP/1.1", "Host: a", "Content-Length: 5", "Transfer-Encoding: chunked"], 400),
        (["POST / HTTP/1.1", "Host: a", "Transfer-Encoding: chunked", "Content-Length: 5"], 400),
        (["POST / HTTP/1.1", "Host: a", "Transfer-Encoding: gzip, chunked"], 501),
        (["POST / HTTP/1.1", "Host: a", "Transfer-Encoding: gzip"], 501),
        (["POST / HTTP/1.0", "Host: a", "Transfer-Encoding: chunked"], 400),
        (["POST / HTTP/1.1", "Host: a", "Content-Length: 5", "Expect: more"], 417),
    ],
)
def test_what_may_be_read_in_two_ways_is_refused(lines, status):
    with pytest.raises(Refused) as refused:
        parse_head(head(*lines))
    assert refused.value.http_status == status
    assert refused.value.close


def test_a_header_that_is_a_number():
    assert header_number({}, "A-B") is None
    assert header_number({"a-b": "12"}, "A-B") == 12
    for wrong in ("-1", "1.0", "", "1, 1", "\u0663", "9" * 19):
        with pytest.raises(InvalidRequest, match=r"A-B is .* must be a number of bytes"):
            header_number({"a-b": wrong}, "A-B")
