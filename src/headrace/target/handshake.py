"""Connections over TLS, and why there is none to a server, in words that name the remedy.

Either speaks TLS where the other does not, or does not take the other's certificate.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from headrace.errors import Unreachable
from headrace.frontend.tls import reason_of
from headrace.target.access import HTTP_1, HTTP_2, Access

HANDSHAKE_S = 10.0  # to connect and to agree on keys, at most
LOOK_S = 5.0  # for a second connection, that looks why the first failed
# OpenSSL's X509_V_ERR codes (x509_vfy.h).
_TOO_EARLY, _EXPIRED = 9, 10
_UNKNOWN_ISSUER = (2, 18, 19, 20, 21)
_OTHER_NAME = (62, 64)
# OpenSSL's reasons for what is no TLS at all.
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")
# Alerts by which servers refuse a client's certificate, or its lack (RFC 8446, 6.2; handshake_failure in TLS 1.2).
_REFUSES_CLIENT = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE", "ACCESS_DENIED")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, and how to get in."""

    url: str
    access: Access

    @property
    def address(self) -> tuple[str, int]:
        """Host and port. Raises Unreachable where the URL names no port of its own kind."""
        parts = urlsplit(self.url)
        try:
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        except ValueError:
            port = None
        if not parts.hostname or port is None:
            raise Unreachable(f"--url {self.url}: names no host and port; give it as {parts.scheme}://HOST:PORT")
        return parts.hostname, port

    @property
    def target(self) -> str:
        """HOST:PORT, as gRPC calls it. Raises as `address` does."""
        return ":".join(map(str, self.address))

    @property
    def protocol(self) -> str:
        return HTTP_2 if self.url.startswith("grpc") else HTTP_1

    def context(self) -> ssl.SSLContext:
        return self.access.context(self.protocol)

    def other(self, scheme: str) -> str:
        """Return the same URL with another scheme."""
        return scheme + "://" + self.url.partition("://")[2]


class _NoGreeting(TimeoutError):
    """The connection is there, and no handshake came of it."""


def connect(endpoint: Endpoint, context: ssl.SSLContext, limit_s: float) -> ssl.SSLSocket:
    """Return an encrypted connection; `limit_s` is each step's. Raises OSError, of which `why` makes sense."""
    peer = socket.create_connection(endpoint.address, timeout=limit_s)
    try:
        return context.wrap_socket(peer, server_hostname=endpoint.address[0])
    except TimeoutError as error:
        peer.close()
        raise _NoGreeting(f"no TLS handshake within {limit_s:g} s") from error
    except BaseException:
        peer.close()
        raise


def require_handshake(endpoint: Endpoint, limit_s: float) -> None:
    """Connect by TLS and agree on a protocol: grpcio would not say why it failed. Raises Unreachable."""
    try:
        with connect(endpoint, endpoint.context(), limit_s) as peer:
            agreed = peer.selected_alpn_protocol()
    except OSError as error:
        raise Unreachable(why(endpoint, error)) from error
    if agreed != endpoint.protocol:
        raise Unreachable(
            f"{endpoint.url}: the server there does not speak HTTP/2, which gRPC needs; give the port of its gRPC, or"
            f" {endpoint.other('https')}"
        )


def why(endpoint: Endpoint, error: Exception) -> str:
    """Say why a server did not answer. May connect once more to find out, and then takes up to twice `LOOK_S`."""
    nobody = f"{endpoint.url}: no server answers there ({endpoint.access.hide(str(error)) or type(error).__name__})"
    if isinstance(error, ConnectionRefusedError | socket.gaierror):
        return nobody
    if not endpoint.access.encrypted:
        if _speaks_tls(endpoint):
            scheme = "grpcs" if endpoint.protocol == HTTP_2 else "https"
            return f"{endpoint.url}: the server there speaks TLS; give {endpoint.other(scheme)}"
        return nobody
    said = None if isinstance(error, ssl.SSLEOFError) else tls_words(endpoint, error)  # an end alone may be a refusal
    return said or _look(endpoint) or nobody


def tls_words(endpoint: Endpoint, error: Exception) -> str | None:
    """Say what an error of TLS means, and what to do; None for an error that is none of TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _certificate_words(endpoint, error)
    plain = endpoint.other("grpc" if endpoint.protocol == HTTP_2 else "http")
    no_tls = f"the server there speaks no TLS ({{}}); give {plain}, or the port that does"
    if isinstance(error, _NoGreeting):
        return f"{endpoint.url}: {no_tls.format(error)}"
    if isinstance(error, ssl.SSLEOFError):
        return f"{endpoint.url}: the server ended the connection during the TLS handshake; if it has none, give {plain}"
    if not isinstance(error, ssl.SSLError):
        return None
    reason = reason_of(error)
    if "ALPN" in reason or "NO_APPLICATION_PROTOCOL" in reason:
        words = f"the server there does not speak {endpoint.protocol}; give the port that does"
    elif "ALERT" in reason and any(each in reason for each in _REFUSES_CLIENT):
        words = _refusal_words(endpoint, reason)
    elif any(each in reason for each in _NO_TLS):
        words = no_tls.format(reason)
    else:
        words = f"TLS failed ({reason})"
    return f"{endpoint.url}: {words}"


def _certificate_words(endpoint: Endpoint, error: ssl.SSLCertVerificationError) -> str:
    code, message = error.verify_code, error.verify_message
    ca_file = endpoint.access.ca_file
    if code in (_EXPIRED, _TOO_EARLY):
        remedy = "have the server given a valid one, or set the clock of this machine"
    elif code in _OTHER_NAME:
        remedy = f"give a name that the certificate is for, in place of {endpoint.address[0]}"
    elif code in _UNKNOWN_ISSUER and ca_file is None:
        remedy = "name a file with the certificate of its authority: --ca-file FILE"
    elif code in _UNKNOWN_ISSUER:
        remedy = f"--ca-file {ca_file} is another authority's; name that of this server's"
    else:
        remedy = "have the server given a valid one"
    return f"{endpoint.url}: the server's certificate is not valid ({message.rstrip('.')}); {remedy}"


def _look(endpoint: Endpoint) -> str | None:
    """Say what a server does after the handshake: TLS 1.3 refuses certificates only then (RFC 8446, 2).

    Nothing is sent meanwhile, since what the server leaves unread makes the system drop its alert. Some end the
    connection without any, ours among them.
    """
    try:
        with connect(endpoint, endpoint.access.context(*dict.fromkeys((endpoint.protocol, HTTP_2))), LOOK_S) as peer:
            agreed = peer.selected_alpn_protocol()
            ended = _ends(peer)
    except OSError as error:
        return tls_words(endpoint, error)
    if agreed == HTTP_2 != endpoint.protocol:
        return f"{endpoint.url}: the server there speaks HTTP/2, as gRPC does; give {endpoint.other('grpcs')}"
    if ended:
        return (
            f"{endpoint.url}: {_refusal_words(endpoint, 'so it seems: it ends the connection after the TLS handshake')}"
        )
    return None


def _ends(peer: ssl.SSLSocket) -> bool:
    try:
        return not peer.recv(1)
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def _refusal_words(endpoint: Endpoint, how: str) -> str:
    given = endpoint.access.client_cert
    if given is None:
        return f"the server wants a client's certificate ({how}); give --client-cert and --client-key"
    return f"the server does not take --client-cert {given} ({how}); give one of an authority that it knows"


def _speaks_tls(endpoint: Endpoint) -> bool:
    """Tell whether a greeting of TLS is answered in TLS, be it by an alert. Nothing is trusted or sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        connect(endpoint, context, LOOK_S).close()
    except ssl.SSLError as error:
        return "ALERT" in reason_of(error)
    except OSError:
        return False
    return True
