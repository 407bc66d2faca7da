"""Tokens and certificates: who is let in, and which files are refused before a server starts."""

import pytest
import trustme

from headrace.errors import InvalidOption
from headrace.frontend.auth import Tokens, require_usable
from headrace.frontend_job import AccessSettings


@pytest.mark.parametrize(
    ("authorization", "is_allowed"),
    [
        ("Bearer one", True),
        ("bearer two", True),
        ("Bearer  two ", True),
        ("Bearer three", False),
        ("Bearer on", False),
        ("Bearer one two", False),
        ("Basic one", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("one", False),
        ("", False),
        ("Bearer \xff", False),
        (None, False),
    ],
)
def test_only_a_bearer_of_a_whole_token_is_let_in(authorization, is_allowed):
    assert Tokens.of(["one", "two"]).allow(authorization) is is_allowed


@pytest.fixture
def tokens(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("# who may\n\n  one  \ntwo # of them\n")
    file.chmod(0o640)
    return file


def test_a_file_has_a_token_per_line_and_comments(tokens):
    read = Tokens.read(tokens)
    assert read == Tokens.of(["one", "two # of them"])
    assert "one" not in repr(read)


@pytest.mark.parametrize("mode", [0o644, 0o602, 0o601])
def test_a_file_that_everybody_may_use_is_refused_with_the_remedy(tokens, mode):
    tokens.chmod(mode)
    with pytest.raises(InvalidOption, match="open to every user of this machine; chmod o= "):
        Tokens.read(tokens)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"# nobody\n", "holds no token"), (b"\xff", "it is not UTF-8"), (None, "No such file")],
    ids=["empty", "binary", "missing"],
)
def test_a_file_that_lets_in_nobody_is_refused(tokens, content, message):
    if content is None:
        tokens.unlink()
    else:
        tokens.write_bytes(content)
    with pytest.raises(InvalidOption, match=message):
        require_usable(AccessSettings(token_file=tokens))


def test_certificates_that_cannot_be_used_are_refused(tmp_path):
    ours, other = (trustme.CA().issue_cert("localhost") for _ in range(2))
    cert, key, wrong = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "wrong.pem"
    ours.cert_chain_pems[0].write_to_path(cert)
    ours.private_key_pem.write_to_path(key)
    other.private_key_pem.write_to_path(wrong)
    require_usable(AccessSettings(tls_cert=cert, tls_key=key, tls_client_ca=cert))
    with pytest.raises(InvalidOption, match=r"--tls-key .*wrong.pem: cannot be used"):
        require_usable(AccessSettings(tls_cert=cert, tls_key=wrong))
    with pytest.raises(InvalidOption, match="No such file"):
        require_usable(AccessSettings(tls_cert=tmp_path / "none.pem", tls_key=key))
    with pytest.raises(InvalidOption, match=r"--tls-client-ca .*key.pem: cannot be used"):
        require_usable(AccessSettings(tls_cert=cert, tls_key=key, tls_client_ca=key))
