"""Which encoding a client gets, by what it says that it takes."""

import pytest

from headrace.frontend.http.compression import accepted


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        ("", None),
        ("identity", None),
        ("br", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("deflate, gzip", "gzip"),
        ("gzip;q=0.5, deflate", "deflate"),
        ("GZIP ; q=0.1", "gzip"),
        ("gzip;q=0", None),
        ("gzip;q=0, deflate;q=0.1", "deflate"),
        ("gzip;q=x", None),
        ("*", "gzip"),
    ],
)
def test_the_encoding_that_a_client_prefers(header, encoding):
    assert accepted(header) == encoding
