"""Who is let in: bearer tokens, whatever the transport, and whether the files that say so can be used."""

from __future__ import annotations

import hashlib
import hmac
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import InvalidOption
from headrace.frontend.tls import server_context

if TYPE_CHECKING:
    from headrace.frontend_job import AccessSettings


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens that are let in, kept as digests. All are compared, and the time taken tells nothing of them."""

    _digests: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def of(cls, tokens: list[str]) -> Tokens:
        return cls(tuple(_digest(token.encode()) for token in tokens))

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """Read a file as `read_tokens` does. Raises InvalidOption, also if it has no token."""
        tokens = read_tokens(path)
        if not tokens:
            raise InvalidOption(f"--token-file {path}: holds no token, and nobody would be let in; write one per line")
        return cls.of(tokens)

    def allow(self, authorization: str | None) -> bool:
        """Tell whether an Authorization header holds one of the tokens: "Bearer TOKEN" (RFC 6750, 2.1)."""
        scheme, _, token = (authorization or "").partition(" ")
        given = _digest(token.strip().encode("utf-8", "surrogateescape"))
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(found)


def read_tokens(path: Path) -> list[str]:
    """Read a file of one token per line; empty lines and those that begin with # say nothing.

    Raises InvalidOption if it cannot be read, or may be read by every user of the machine.
    """
    try:
        mode = path.stat().st_mode
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidOption(f"--token-file {path}: cannot be read ({reason})") from error
    if mode & stat.S_IRWXO:
        raise InvalidOption(f"--token-file {path}: open to every user of this machine; chmod o= {path}")
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def require_usable(access: AccessSettings) -> None:
    """Read all files once, before anything is started. Raises InvalidOption."""
    server_context(access)
    if access.token_file is not None:
        Tokens.read(access.token_file)
