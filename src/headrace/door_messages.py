"""What is said at a server's door: a Unix socket through which a program on the same host gets a ring to a model.

Each side says one thing: a length in 4 bytes, little-endian, then JSON. With `Granted` come five file descriptors
(SCM_RIGHTS, unix(7)): the ring's memory, the eventfd that wakes the backend, the one that wakes the client, a pidfd of
the backend's process, and a pipe that is closed when that process begins to end. The connection then stays open as long
as the client wants the ring. The server half-closes it when the client should ask again, because the version is
unloaded, another one is the default now, or the server stops: what is under way is still answered.
Nothing is pickled.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from headrace.control import ServedModel
from headrace.errors import TransportFailed

DESCRIPTORS = 5
MOST_ASKED_BYTES = 4096
MOST_ANSWERED_BYTES = 1 << 20
LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group
_WILDCARDS = {4: "0.0.0.0", 6: "::"}  # noqa: S104  names of sockets, not addresses to listen on


Trust = Callable[[int], bool]  # of a user's number


class Peer(NamedTuple):
    """Who is at the other end of a connection, as the kernel has noted it."""

    process: int  # 0 where it is in a namespace that we cannot see
    user: int


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client wants a ring to a model; without a model's name, to hear which models there are."""

    model: str = ""
    version: str | None = None  # None: the newest
    rows: int = (
        0  # of the ring; 0: as the server thinks fit. It gives at least a largest batch, and no more than it may
    )
    engine: int | None = None  # of the version; None: any


class Granted(msgspec.Struct, frozen=True, tag="granted"):
    """The ring is there: its descriptors come with this."""

    rows: int
    model: ServedModel
    engine: int = 0  # which of the version's engines it is to
    engines: tuple[int, ...] = (0,)  # all that are ready


class Models(msgspec.Struct, frozen=True, tag="models"):
    """All versions that are ready."""

    models: tuple[ServedModel, ...]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """There is no ring. `error` is a class of `headrace.errors`."""

    error: str
    text: str


Answer = Granted | Models | Refused
_asked = msgspec.json.Decoder(Ask).decode
_answered: Callable[[bytes], Answer] = msgspec.json.Decoder(Answer).decode


def peer_of(connection: socket.socket) -> Peer:
    """Return who connected, or who listens. Source: SO_PEERCRED, unix(7)."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(data)
    return Peer(process, user)


def trusts_user(user: int) -> bool:
    """Tell whether a process of this user may share memory with us: our own user, and root."""
    return user in (0, os.geteuid())


def encode(message: Ask | Answer) -> bytes:
    data = msgspec.json.encode(message)
    return LENGTH.pack(len(data)) + data


def body_bytes(head: bytes, most: int) -> int:
    """Return how many bytes follow a message's length. Raises TransportFailed beyond `most`."""
    (size,) = LENGTH.unpack(head)
    if size > most:
        raise TransportFailed(f"a message of {size} bytes at the ring's socket; at most {most} are taken")
    return int(size)


def decode_ask(body: bytes) -> Ask:
    """Raises TransportFailed for anything else."""
    try:
        return _asked(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TransportFailed(f"no message that the ring's socket knows: {error}") from error


def decode_answer(body: bytes) -> Answer:
    """Raises TransportFailed for anything else."""
    try:
        return _answered(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TransportFailed(f"no message that the ring's socket knows: {error}") from error


def door_of(host: str, port: int) -> str:
    """Return the address of the door of a server that listens on this IP address and port.

    It is in the abstract namespace ("@" for the leading NUL, unix(7)): such a name belongs to the network namespace, as
    the port does, so it can only mean the same server; and it is gone with the server.
    """
    return f"@headrace/{host}:{port}"


def doors_of(url: str) -> tuple[str, ...]:
    """Return where the door of an HTTP server may be, if it is on this host; none where something lies between."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    if parts.path not in ("", "/"):  # a proxy's path, and behind it is another server
        return ()
    hosts = ("127.0.0.1", "::1") if host == "localhost" else (host,)
    found = []
    for each in hosts:
        try:
            address = ipaddress.ip_address(each)
        except ValueError:
            continue
        found.append(door_of(str(address), port))
        if address.is_loopback:  # then also a server that listens on all addresses is this one
            found.append(door_of(_WILDCARDS[address.version], port))
    return tuple(found)


def socket_address(door: str) -> str:
    """Return what `socket.connect` and `bind` take: a path, or an abstract name written with "@"."""
    return "\0" + door[1:] if door.startswith("@") else door
