"""Tokens and certificates that a target names: what is read of them, what is refused, and that no token is shown."""

from pathlib import Path

import pytest

from headrace.config import AccessConfig, TargetConfig
from headrace.errors import InvalidOption
from headrace.target.access import Access, read_access
from tests.target.certificates import Certificates


def read(scheme="http", **access):
    return read_access(TargetConfig(url=f"{scheme}://h:1", model="m", access=AccessConfig(**access)))


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text("# mine\n\n a.b-c_d~e+f/g== \n")
    path.chmod(0o600)
    return path


def test_a_file_holds_a_token(token_file):
    access = read(token_file=token_file)
    assert access.authorization == {"authorization": "Bearer a.b-c_d~e+f/g=="}
    assert access.metadata == (("authorization", "Bearer a.b-c_d~e+f/g=="),)
    assert "a.b" not in repr(access)


def test_a_variable_holds_a_token(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret\n")
    access = read(token_env="MY_TOKEN")  # noqa: S106  its name
    assert access.metadata == (("authorization", "Bearer secret"),)


def test_without_a_token_nothing_is_sent():
    assert (read().authorization, read().metadata) == ({}, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("one\ntwo\n", "holds 2 tokens, a line each; leave one"),
        ("# none\n", "holds 0 tokens"),
        ("two words\n", "is no token"),
        ("sécret\n", "is no token"),
    ],
    ids=["two", "none", "spaces", "not ASCII"],
)
def test_a_file_without_one_token_is_refused_and_none_is_shown(token_file, content, message):
    token_file.write_text(content)
    with pytest.raises(InvalidOption, match=message) as refused:
        read(token_file=token_file)
    assert not any(word in str(refused.value) for word in ("one\n", "two words", "sécret"))


def test_a_file_that_others_may_read_is_refused(token_file):
    token_file.chmod(0o644)
    with pytest.raises(InvalidOption, match="open to every user of this machine; chmod o= "):
        read(token_file=token_file)


def test_a_file_that_can_be_read_only_once_is_refused():
    with pytest.raises(InvalidOption, match="/dev/null: is no regular file"):
        read(token_file=Path("/dev/null"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MY_TOKEN", " ", "not set, or empty"),
        ("MY_TOKEN", "a\nX-Injected: b", "is no token"),
        ("TORCH_TOKEN", "secret", "results record variables of such names"),
    ],
    ids=["empty", "two lines", "recorded"],
)
def test_a_variable_that_cannot_be_used_is_refused_and_not_shown(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidOption, match=message) as refused:
        read(token_env=name)
    assert value.strip() not in str(refused.value) or not value.strip()


def test_files_of_tls_are_tried_before_anything_starts(tmp_path):
    made = Certificates(tmp_path)
    cert, key = made.client
    assert read("https", ca_file=made.ca, client_cert=cert, client_key=key).encrypted
    with pytest.raises(InvalidOption, match=r"--client-key .*stranger-key.pem: cannot be used .*; give a certificate"):
        read("grpcs", client_cert=cert, client_key=made.stranger[1])
    with pytest.raises(InvalidOption, match=r"--ca-file .*client-key.pem: cannot be used .*; give certificates, PEM"):
        read("https", ca_file=key)


def test_what_a_server_repeats_of_a_token_is_hidden():
    assert (
        Access(token="secret").hide(  # noqa: S106
            "no 'secret', not secret"
        )
        == "no '(token)', not (token)"
    )
    assert Access().hide("secret") == "secret"
