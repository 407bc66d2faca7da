"""What a server asks of its clients, a bearer token or TLS, read from the files and the variable that options name.

The token goes from process to process in memory. Nothing of it is printed or written: what a server says is repeated
without it.
"""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from headrace.bench.environment import STEERING
from headrace.config import TargetConfig
from headrace.errors import InvalidOption
from headrace.frontend.auth import read_tokens
from headrace.frontend.tls import reason_of, refuse_password

HTTP_1, HTTP_2 = "http/1.1", "h2"  # as TLS names them (RFC 7301)
HIDDEN = "(token)"
_TOKEN = re.compile("[!-~]+")  # more than RFC 6750 (2.1) allows, and nothing that could end a header


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How connections to one server are made. Without any field they are plain."""

    encrypted: bool = False
    ca_file: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def authorization(self) -> dict[str, str]:
        """The header that carries the token (RFC 6750, 2.1); nothing where there is none."""
        return {} if self.token is None else {"authorization": f"Bearer {self.token}"}

    @property
    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """The same for gRPC."""
        return tuple(self.authorization.items()) or None

    def context(self, *protocols: str) -> ssl.SSLContext:
        """Return what makes connections over TLS that offer these. Raises InvalidOption for unusable files."""
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise InvalidOption(
                f"--ca-file {self.ca_file}: cannot be used ({reason_of(error)}); give certificates, PEM"
            ) from error
        context.set_alpn_protocols(list(protocols))
        if self.client_cert is not None:
            try:
                context.load_cert_chain(self.client_cert, self.client_key, password=refuse_password)
            except (OSError, ValueError) as error:
                raise InvalidOption(
                    f"--client-cert {self.client_cert} with --client-key {self.client_key}: cannot be used"
                    f" ({reason_of(error)}); give a certificate chain and its key, both PEM, the key without a password"
                ) from error
        return context

    def channel(self, address: str, options: list[tuple[str, int]]) -> grpc.Channel:
        """Return a gRPC channel. What this system trusts is then what grpcio brings along."""
        if not self.encrypted:
            return grpc.insecure_channel(address, options)
        credentials = grpc.ssl_channel_credentials(*map(_bytes, (self.ca_file, self.client_key, self.client_cert)))
        return grpc.secure_channel(address, credentials, options)

    def hide(self, text: str) -> str:
        """Return what a server said, without the token, should it have repeated that."""
        return text if self.token is None else text.replace(self.token, HIDDEN)


def read_access(target: TargetConfig) -> Access:
    """Read the files and the variable, which the target names. Raises InvalidOption for what cannot be used."""
    config = target.access
    access = Access(
        encrypted=target.encrypted,
        ca_file=config.ca_file,
        client_cert=config.client_cert,
        client_key=config.client_key,
        token=_token_of_file(config.token_file) if config.token_file is not None else _token_of(config.token_env),
    )
    if access.encrypted:
        access.context(HTTP_1)
    return access


def _token_of_file(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise InvalidOption(f"--token-file {path}: is no regular file, and it is read more than once; give one")
    tokens = read_tokens(path)
    if len(tokens) != 1:
        raise InvalidOption(f"--token-file {path}: holds {len(tokens)} tokens, a line each; leave one")
    return _usable(tokens[0], f"--token-file {path}")


def _token_of(variable: str | None) -> str | None:
    if variable is None:
        return None
    if variable.startswith(STEERING):
        raise InvalidOption(f"--token-env {variable}: results record variables of such names; choose another")
    value = os.environ.get(variable, "").strip()
    if not value:
        raise InvalidOption(f"--token-env {variable}: the variable is not set, or empty; export it")
    return _usable(value, f"--token-env {variable}")


def _usable(token: str, named: str) -> str:
    if _TOKEN.fullmatch(token) is None:
        raise InvalidOption(f"{named}: what it holds is no token: it has spaces, or letters beyond ASCII")
    return token


def _bytes(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
