"""Hosts, origins and URLs: read as headers and options have them, and refused where they are none."""

import pytest

from headrace.addresses import (
    Authority,
    Origin,
    own_hosts,
    read_authority,
    read_origin,
    require_host,
    require_origin,
    require_traces_url,
    traces_url,
)
from headrace.errors import InvalidOption
from headrace.serve_config import ServeConfig, ServedModelConfig


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("localhost", Authority("localhost", None)),
        ("LocalHost:8000", Authority("localhost", 8000)),
        ("127.0.0.1:80", Authority("127.0.0.1", 80)),
        ("[::1]:8000", Authority("::1", 8000)),
        ("[::1]", Authority("::1", None)),
        ("::1", None),
        ("a:b", None),
        ("a:", None),
        ("a b", None),
        ("user@a", None),
        ("a/b", None),
        ("localhost, evil.test", None),
        ("", None),
    ],
)
def test_an_authority_is_a_host_and_perhaps_a_port(text, read):
    assert read_authority(text) == read


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("http://a", Origin("http", "a", 80)),
        ("HTTPS://A.test:443", Origin("https", "a.test", 443)),
        ("http://[::1]:3000", Origin("http", "::1", 3000)),
        ("tauri://localhost", Origin("tauri", "localhost", None)),
        ("null", None),
        ("*", None),
        ("http://a/", None),
        ("http://a, http://b", None),
        ("a:80", None),
        ("", None),
    ],
)
def test_an_origin_is_a_scheme_a_host_and_a_port(text, read):
    assert read_origin(text) == read


@pytest.mark.parametrize(
    ("host", "allowed", "own"),
    [
        ("127.0.0.1", (), {"localhost", "127.0.0.1", "::1"}),
        ("127.0.0.7", (), {"localhost", "127.0.0.1", "::1", "127.0.0.7"}),
        ("LOCALHOST", ("GPU.lan", "[fd00::1]"), {"localhost", "127.0.0.1", "::1", "gpu.lan", "fd00::1"}),
        ("0.0.0.0", (), None),  # noqa: S104
        ("gpu.lan", (), None),
        ("0.0.0.0", ("gpu.lan",), {"localhost", "127.0.0.1", "::1", "0.0.0.0", "gpu.lan"}),  # noqa: S104
    ],
)
def test_a_server_of_this_machine_knows_its_names_and_another_is_told_them(host, allowed, own):
    found = own_hosts(host, allowed)
    assert (None if found is None else set(found)) == own


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
        ("https://collector.lan/otlp", "https://collector.lan/otlp/v1/traces"),
        ("http://[::1]:4318/v1/traces", "http://[::1]:4318/v1/traces"),
        ("HTTP://collector", "HTTP://collector/v1/traces"),
    ],
)
def test_traces_go_below_the_collectors_address(endpoint, url):
    assert traces_url(endpoint) == url
    require_traces_url(endpoint)


@pytest.mark.parametrize(
    "endpoint",
    ["127.0.0.1:4318", "grpc://a:4317", "http://", "http://a:0", "http://a:65536", "http://u:p@a", "http://a?k=v", ""],
)
def test_what_is_no_collectors_address_is_refused_with_what_is(endpoint):
    with pytest.raises(InvalidOption, match=r"--trace-endpoint .*: must be http://HOST:PORT"):
        require_traces_url(endpoint)


@pytest.mark.parametrize("origin", ["null", "localhost:3000", "http://a/", "http://", "**"])
def test_what_is_no_origin_is_refused_with_what_is(origin):
    with pytest.raises(InvalidOption, match=r"--allow-origin .*: must be SCHEME://HOST"):
        require_origin(origin)


@pytest.mark.parametrize("host", ["http://a", "a:80", "[::1]:80", "a/b", "*"])
def test_what_is_no_host_is_refused_with_what_is(host):
    with pytest.raises(InvalidOption, match=r"--allow-host .*: must be a name or an address, without a port"):
        require_host(host)


@pytest.mark.parametrize("host", ["gpu.lan", "10.0.0.1", "::1", "[::1]"])
def test_names_and_addresses_are_hosts(host):
    require_host(host)


@pytest.mark.parametrize(
    "wrong", [{"allow_origin": ("http://a", "b")}, {"allow_host": ("a", "b:1")}], ids=lambda wrong: next(iter(wrong))
)
def test_a_server_is_not_configured_with_any_of_them(wrong):
    with pytest.raises(InvalidOption, match=r"--allow-\w+ b(:1)?: must be"):
        ServeConfig(models=(ServedModelConfig(name="m"),), **wrong).validate()
