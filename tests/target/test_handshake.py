"""No way in: each reason is named at once, with the remedy, over HTTP and over gRPC, and nothing is written."""

import contextlib
import json
import socket
import ssl
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.bench.summary import encode
from headrace.config import AccessConfig, LoadConfig
from headrace.errors import InvalidOption, Unreachable
from tests import commands
from tests.serving import Server
from tests.target.certificates import Certificates
from tests.target.running import answered, measure

BURST = LoadConfig(kind="burst", num_iters=12)
TOKEN = "s3cret-Token.of~this_server"  # noqa: S105  made up
SCHEMES = ("https", "grpcs")
PROTOCOLS = {"https": "http/1.1", "grpcs": "h2"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


@contextlib.contextmanager
def listening(context=None, says=b""):
    """A server that shakes hands if it has a context, says this, and nothing else until the client goes."""

    def serve(peer):
        with contextlib.suppress(OSError), contextlib.ExitStack() as open_things:
            peer = open_things.enter_context(peer)
            if context is not None:
                peer = open_things.enter_context(context.wrap_socket(peer, server_side=True))
            peer.sendall(says)
            while peer.recv(1 << 16):
                pass

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def refused(folder, url, *, timeout_s=20, **access):
    """Return what a run says that finds no way in."""
    with pytest.raises(Unreachable) as error:
        measure(folder, url, BURST, model="served", request_timeout_s=timeout_s, access=AccessConfig(**access))
    assert not (folder / "run").exists()
    assert str(error.value).startswith(f"{url}: ")
    return str(error.value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_certificate_that_is_not_valid_is_named_with_the_remedy(made, tmp_path, scheme):
    def words(pair, **access):
        with listening(made.context(pair, protocol=PROTOCOLS[scheme])) as port:
            return refused(tmp_path, f"{scheme}://localhost:{port}", **access)

    assert "name a file with the certificate of its authority: --ca-file FILE" in words(made.server)
    assert f"--ca-file {made.other_ca} is another authority's" in words(made.server, ca_file=made.other_ca)
    other = words(made.elsewhere, ca_file=made.ca)
    assert "not valid for 'localhost'" in other
    assert "give a name that the certificate is for, in place of localhost" in other
    assert "certificate has expired); have the server given a valid one" in words(made.expired, ca_file=made.ca)


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_server_that_wants_a_clients_certificate_is_understood(made, tmp_path, scheme, newest):
    cert, key = made.stranger
    context = made.context(protocol=PROTOCOLS[scheme], client_ca=made.ca, newest=newest)
    with listening(context) as port:
        url = f"{scheme}://localhost:{port}"
        assert "give --client-cert and --client-key" in refused(tmp_path, url, ca_file=made.ca)
        given = refused(tmp_path, url, ca_file=made.ca, client_cert=cert, client_key=key)
        assert f"the server does not take --client-cert {cert}" in given


@pytest.mark.parametrize(("scheme", "plain"), [("https", "http"), ("grpcs", "grpc")])
@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""], ids=["refuses", "is silent"])
def test_tls_to_a_port_without_it_ends_soon(tmp_path, scheme, plain, says):
    with listening(says=says) as port:
        words = refused(tmp_path, f"{scheme}://localhost:{port}", timeout_s=0.5)
    assert "the server there speaks no TLS" in words
    assert f"give {plain}://localhost:{port}" in words


@pytest.mark.parametrize(("scheme", "encrypted"), [("http", "https"), ("grpc", "grpcs")])
def test_plain_to_a_port_of_tls_names_the_scheme(made, tmp_path, scheme, encrypted):
    with listening(made.context(protocol=PROTOCOLS[encrypted])) as port:
        words = refused(tmp_path, f"{scheme}://localhost:{port}")
    assert words == f"{scheme}://localhost:{port}: the server there speaks TLS; give {encrypted}://localhost:{port}"


def test_grpc_to_a_port_of_http_within_tls_is_named(made, tmp_path):
    with listening(made.context(protocol="http/1.1")) as port:
        words = refused(tmp_path, f"grpcs://localhost:{port}", ca_file=made.ca)
    assert "does not speak HTTP/2, which gRPC needs" in words


@pytest.mark.parametrize("scheme", SCHEMES)
def test_where_nobody_listens_that_is_said(made, tmp_path, scheme):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "no server answers there" in refused(tmp_path, f"{scheme}://localhost:{port}", ca_file=made.ca)


@pytest.fixture(scope="module")
def server(made, tmp_path_factory):
    """Ours, with a certificate, for clients that have one too, and a token."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "tokens").write_text(f"{TOKEN}\n")
    (folder / "tokens").chmod(0o600)
    started = Server(
        folder,
        *("--tls-cert", made.server[0], "--tls-key", made.server[1], "--tls-client-ca", made.ca),
        *("--token-file", folder / "tokens"),
    )
    started.tokens = folder / "tokens"
    yield started
    started.stop()


def url_of(server, scheme):
    return f"{scheme}://{server.address if scheme in ('http', 'https') else server.grpc_address}"


def let_in(made, **more):
    cert, key = made.client
    return AccessConfig(ca_file=made.ca, client_cert=cert, client_key=key, **more)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_our_server_is_measured_by_several_processes_and_no_result_holds_the_token(made, server, tmp_path, scheme):
    outcome = measure(
        tmp_path,
        url_of(server, scheme),
        LoadConfig(kind="constant", rate=60, num_iters=30),
        model="served",
        int_range=(20, 60),
        generators=2,
        access=let_in(made, token_file=server.tokens),
    )
    summary = outcome.summary
    assert summary.error is None
    assert summary.target.server_success == len(answered(outcome)) == 30
    assert summary.experiment == f"{scheme}-served"
    assert any(mark.startswith("not calibrated") for mark in summary.marks)
    assert TOKEN not in repr(outcome)
    assert str(server.tokens).encode() in encode(summary)
    assert_without_token(tmp_path / "run")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_the_servers_token_nobody_is_let_in_and_the_options_are_named(made, server, tmp_path, scheme):
    (tmp_path / "wrong").write_text("wrong-token\n")
    (tmp_path / "wrong").chmod(0o600)
    for given, remedy in (
        ({}, "name a file that holds its bearer token with --token-file, or a variable with --token-env"),
        ({"token_file": tmp_path / "wrong"}, "it does not take the token"),
    ):
        with pytest.raises(InvalidOption, match=remedy) as error:
            measure(
                tmp_path,
                url_of(server, scheme),
                BURST,
                model="served",
                access=let_in(made, **given),
            )
        assert "wrong-token" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_a_certificate_nobody_is_let_in(made, server, tmp_path, scheme):
    assert "give --client-cert and --client-key" in refused(tmp_path, url_of(server, scheme), ca_file=made.ca)


@pytest.mark.parametrize(("scheme", "encrypted"), [("http", "https"), ("grpc", "grpcs")])
def test_in_plain_text_our_server_lets_nobody_in(server, tmp_path, scheme, encrypted):
    assert f"speaks TLS; give {encrypted}://" in refused(tmp_path, url_of(server, scheme))


@pytest.mark.parametrize(
    ("scheme", "of", "named"),
    [("https", "grpc", "speaks HTTP/2, as gRPC does"), ("grpcs", "http", "does not speak HTTP/2")],
)
def test_the_wrong_one_of_a_servers_ports_is_named(made, server, tmp_path, scheme, of, named):
    cert, key = made.client
    url = f"{scheme}://{server.address if of == 'http' else server.grpc_address}"
    words = refused(tmp_path, url, ca_file=made.ca, client_cert=cert, client_key=key)
    assert named in words


def test_the_command_takes_the_token_from_a_variable_and_prints_nothing_of_it(made, server, tmp_path, monkeypatch):
    monkeypatch.setenv("A_TOKEN", TOKEN)
    ended = commands.run(
        *("bench", "--url", url_of(server, "https"), "--model", "served", "--int-range", 20, 60),
        *("--ca-file", made.ca, "--client-cert", made.client[0], "--client-key", made.client[1]),
        *("--token-env", "A_TOKEN", "--load", "closed", "--concurrency", 2, "--num-iters", 20),
        *("--output-dir", "run", "--output-file", "runs.csv", "--json"),
        cwd=tmp_path,
    )
    assert ended.code == 0, ended.err
    assert "A_TOKEN" in json.loads(ended.out)["options"]["target"]["access"].values()
    assert TOKEN not in ended.out + ended.err
    assert_without_token(tmp_path)


def assert_without_token(folder):
    """No file holds the token; records could not even, having no text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"summary.json", "requests.parquet"} <= {path.name for path in files}
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path
        if path.suffix == ".parquet":
            texts = [field.name for field in pq.read_schema(path) if _holds_text(field.type)]
            for row in pq.read_table(path, columns=texts).to_pylist():
                assert TOKEN not in str(row)


def _holds_text(kind):
    return not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))
