"""Hosts, origins and URLs as options and headers have them. They are only read: nothing is looked up."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from headrace.errors import InvalidOption

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
ANY_ORIGIN = "*"
TRACES_PATH = "/v1/traces"
DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST = r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::(?P<port>[0-9]{1,5}))?"
_AUTHORITY = re.compile(_HOST)
_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://" + _HOST)
_COLLECTOR = re.compile(r"(?P<base>https?://" + _HOST + r"(?:/[^\s?#@]*)?)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Authority:
    """A host, in lower case and without brackets, and a port if one was given."""

    host: str
    port: int | None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a web page comes from (RFC 6454); the port is the scheme's own where none was given."""

    scheme: str
    host: str
    port: int | None


def read_authority(text: str) -> Authority | None:
    """Read HOST, HOST:PORT or [IPV6]:PORT, as a Host header has it (RFC 9110, 7.2); None where it is none."""
    found = _AUTHORITY.fullmatch(text.lower())
    return (
        None if found is None else Authority(found["host"].strip("[]"), int(found["port"]) if found["port"] else None)
    )


def read_origin(text: str) -> Origin | None:
    """Read SCHEME://HOST[:PORT], as an Origin header has it; None for "null" and whatever else is none."""
    found = _ORIGIN.fullmatch(text.lower())
    if found is None:
        return None
    port = int(found["port"]) if found["port"] else DEFAULT_PORTS.get(found["scheme"])
    return Origin(found["scheme"], found["host"].strip("[]"), port)


def own_hosts(host: str, allowed: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the names by which requests may ask for a server that listens on `host`; None: by any.

    Only a server of this machine knows all its names. Another one has to be told some before it can refuse the rest.
    """
    if not allowed and not _is_loopback(host):
        return None
    return (*LOCAL_NAMES, host.lower(), *(name.lower().strip("[]") for name in allowed))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def traces_url(endpoint: str) -> str | None:
    """Return where a collector takes traces, given its base URL; None where that is no such URL.

    Source: OpenTelemetry Protocol Exporter, "Endpoint URLs for OTLP/HTTP".
    """
    found = _COLLECTOR.fullmatch(endpoint)
    if found is None or int(found["port"] or 1) not in range(1, 65536):
        return None
    base = found["base"].rstrip("/")
    return base if base.endswith(TRACES_PATH) else base + TRACES_PATH


def require_origin(text: str) -> None:
    """Refuse what is no origin of a page. Raises InvalidOption."""
    if text != ANY_ORIGIN and read_origin(text) is None:
        raise InvalidOption(
            f"--allow-origin {text}: must be SCHEME://HOST or SCHEME://HOST:PORT, with nothing behind it, or * for"
            " pages of every origin"
        )


def require_host(text: str) -> None:
    """Refuse what is no host's name or address. Raises InvalidOption."""
    found = read_authority(text) or read_authority(f"[{text}]")
    if found is None or found.port is not None:
        raise InvalidOption(f"--allow-host {text}: must be a name or an address, without a port")


def require_traces_url(endpoint: str) -> None:
    """Refuse what is no collector's address. Raises InvalidOption."""
    if traces_url(endpoint) is None:
        raise InvalidOption(
            f"--trace-endpoint {endpoint}: must be http://HOST:PORT or https://HOST:PORT of a collector that speaks"
            " OTLP over HTTP; what it wants to be told in headers goes into OTEL_EXPORTER_OTLP_HEADERS"
        )
