"""The client's side of a server's door: asks for a ring, and gets its memory as file descriptors."""

from __future__ import annotations

import os
import socket
from array import array
from dataclasses import dataclass

from headrace.client.failures import named
from headrace.control import ServedModel
from headrace.door_messages import (
    DESCRIPTORS,
    LENGTH,
    MOST_ANSWERED_BYTES,
    Answer,
    Ask,
    Granted,
    Models,
    Refused,
    Trust,
    body_bytes,
    decode_answer,
    encode,
    peer_of,
    socket_address,
    trusts_user,
)
from headrace.errors import HeadraceError, TransportFailed, Unreachable
from headrace.transport.layout import Layout
from headrace.transport.pair import RingPair

LIMIT_S = 10.0  # for the server to make the ring and answer


@dataclass(slots=True, eq=False)
class Ring:
    """A ring to one version of a model, and the connection that keeps it."""

    model: ServedModel
    pair: RingPair
    connection: socket.socket
    engine: int  # which of the version's it is to
    engines: tuple[int, ...]  # all that are ready

    def close(self) -> None:
        self.pair.close()
        self.connection.close()


def ask_for_ring(doors: tuple[str, ...], ask: Ask, trusts: Trust = trusts_user) -> Ring:
    """Return a ring from the first door that is there. Blocks.

    Raises Unreachable where there is no door, or one of a user who is not trusted; TransportFailed; and what the server
    refuses with, such as NotReady, UnknownModel or QueueFull.
    """
    connection = _connect(doors, trusts)
    try:
        answer, descriptors = _talk(connection, ask)
        try:
            pair = _pair(answer, descriptors)
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
    except BaseException:
        connection.close()
        raise
    assert isinstance(answer, Granted)
    return Ring(answer.model, pair, connection, answer.engine, answer.engines)


def ask_for_models(doors: tuple[str, ...], trusts: Trust = trusts_user) -> tuple[ServedModel, ...]:
    """Return the versions that are ready. Raises as `ask_for_ring` does."""
    with _connect(doors, trusts) as connection:
        answer, descriptors = _talk(connection, Ask())
    for descriptor in descriptors:
        os.close(descriptor)
    if not isinstance(answer, Models):
        raise TransportFailed(f"the server was asked for its models and said {type(answer).__name__}")
    return answer.models


def _connect(doors: tuple[str, ...], trusts: Trust) -> socket.socket:
    reasons = []
    for door in doors:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(LIMIT_S)
            connection.connect(socket_address(door))
            user = peer_of(connection).user
        except OSError as error:
            reasons.append(f"{door}: {error.strerror or error}")
            connection.close()
            continue
        if trusts(user):
            return connection
        reasons.append(f"{door}: belongs to user {user}")
        connection.close()
    raise Unreachable(f"no server offers shared memory here ({'; '.join(reasons) or 'it is not on this host'})")


def _talk(connection: socket.socket, ask: Ask) -> tuple[Answer, list[int]]:
    """Return the answer and the descriptors that came with it, which are the caller's now."""
    descriptors: list[int] = []
    try:
        connection.sendall(encode(ask))
        head = _receive(connection, LENGTH.size, descriptors)
        body = _receive(connection, body_bytes(head, MOST_ANSWERED_BYTES), descriptors)
        return decode_answer(body), descriptors
    except BaseException as error:
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(error, OSError):
            raise Unreachable(f"the server's socket for rings does not answer: {error}") from error
        raise


def _receive(connection: socket.socket, size: int, descriptors: list[int]) -> bytes:
    data = bytearray()
    while len(data) < size:
        part, told = _receive_part(connection, size - len(data))
        descriptors += told
        if not part:
            raise ConnectionResetError("it closed the connection")
        data += part
    return bytes(data)


def _receive_part(connection: socket.socket, size: int) -> tuple[bytes, array[int]]:
    """`socket.recv_fds`, but no descriptor gets to programs that another thread starts: it leaves its flags out."""
    came = array("i")
    room = socket.CMSG_LEN(DESCRIPTORS * came.itemsize)
    part, ancillary, _, _ = connection.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            came.frombytes(data[: len(data) - len(data) % came.itemsize])
    return part, came


def _pair(answer: Answer, descriptors: list[int]) -> RingPair:
    if isinstance(answer, Refused):
        raise _refusal(answer)
    if not isinstance(answer, Granted) or len(descriptors) != DESCRIPTORS:
        raise TransportFailed(f"the server granted no ring: {type(answer).__name__}, {len(descriptors)} descriptors")
    model = answer.model
    layout = Layout(rows=answer.rows, inputs=model.inputs, outputs=model.outputs)
    if os.fstat(descriptors[0]).st_size != layout.total_bytes:  # reading past its end would kill us
        raise TransportFailed("the ring's memory is not as large as its layout; both sides need the same version")
    return RingPair(layout, *descriptors)


def _refusal(answer: Refused) -> HeadraceError:
    return (named(answer.error) or TransportFailed)(answer.text)
