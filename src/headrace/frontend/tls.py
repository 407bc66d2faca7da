"""Encrypted connections, and clients that must show a certificate."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from headrace.errors import InvalidOption

if TYPE_CHECKING:
    from headrace.frontend_job import AccessSettings


def server_context(access: AccessSettings) -> ssl.SSLContext | None:
    """Return what a listening socket needs for TLS 1.2 and later; None where no certificate is given.

    Raises InvalidOption if the files cannot be read or do not belong together.
    """
    if access.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(access.tls_cert, access.tls_key, password=refuse_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise InvalidOption(
            f"--tls-cert {access.tls_cert} with --tls-key {access.tls_key}: cannot be used ({reason_of(error)}); give a"
            " certificate chain and its key, both PEM, the key without a password"
        ) from error
    if access.tls_client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(access.tls_client_ca)
        except OSError as error:
            raise InvalidOption(
                f"--tls-client-ca {access.tls_client_ca}: cannot be used ({reason_of(error)}); give certificates, PEM"
            ) from error
    return context


def refuse_password() -> str:
    """Answer OpenSSL, which would else ask at the terminal for a key's password."""
    raise ValueError("the key has a password")


def reason_of(error: Exception) -> str:
    """Return why files or a handshake failed, in OpenSSL's or the system's words."""
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
