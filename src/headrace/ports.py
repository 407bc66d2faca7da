"""A port that several processes will listen on, kept for them by one that only holds it."""

from __future__ import annotations

import socket

from headrace.errors import InvalidOption


def reserve_port(option: str, host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen; others of this user may listen there with SO_REUSEPORT.

    Its address says which port it is where `port` is 0. Raises InvalidOption, naming `option`, if the port is in use:
    SO_REUSEPORT alone would let two servers share it, and each get a part of the other's connections.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as probe:
            address = probe.getsockname()
        held = socket.socket(family, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
    except OSError as error:
        raise InvalidOption(
            f"{option} {port} on {host}: cannot listen there ({error.strerror}); choose another port or address, or"
            " stop what uses it"
        ) from error
    return held
