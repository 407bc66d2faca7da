"""How fast one process sends bodies over loopback: `sendmsg` from memory, and `sendfile` from a memfd, in turn.

    python benchmarks/send_rate.py --rounds 5

Another process reads and throws away. Printed are medians over the rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

SIZES = (1_024, 65_536, 750_000, 24_000_000)
HEAD = b"h" * 150
BYTES = 1 << 29  # of a round, at most
REQUESTS = 5_000  # likewise
READ_BYTES = 1 << 20


Send = Callable[[socket.socket, int, bytes], None]


def read(port_pipe: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port_pipe.send(listener.getsockname()[1])
        peer, _ = listener.accept()
    buffer = bytearray(READ_BYTES)
    with peer:
        while peer.recv_into(buffer):
            pass


def send_message(peer: socket.socket, _descriptor: int, data: bytes) -> None:
    left = memoryview(data)[max(0, peer.sendmsg([HEAD, data]) - len(HEAD)) :]
    while len(left):
        left = left[peer.send(left) :]


def send_file(peer: socket.socket, descriptor: int, data: bytes) -> None:
    peer.send(HEAD, socket.MSG_MORE)
    sent = 0
    while sent < len(data):
        sent += os.sendfile(peer.fileno(), descriptor, sent, len(data) - sent)


def one_round(send: Send, descriptor: int, data: bytes) -> tuple[float, float]:
    """Return microseconds of wall clock and of this process's CPU for each request."""
    ours, theirs = multiprocessing.Pipe()
    reader = multiprocessing.Process(target=read, args=(theirs,))
    reader.start()
    count = max(10, min(REQUESTS, BYTES // len(data)))
    with socket.create_connection(("127.0.0.1", ours.recv())) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            send(peer, descriptor, data)
        cpu = time.process_time() - cpu
    reader.join()
    return (time.perf_counter() - began) / count * 1e6, cpu / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for size in SIZES:
        data = os.urandom(size)
        descriptor = os.memfd_create("bodies")
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(data)
        times: dict[Send, list[tuple[float, float]]] = {send_message: [], send_file: []}
        for _ in range(rounds):
            for send, found in times.items():
                found.append(one_round(send, descriptor, data))
        for send, found in times.items():
            wall, cpu = (statistics.median(each) for each in zip(*found, strict=True))
            name = "sendmsg" if send is send_message else "sendfile"
            sys.stdout.write(
                f"{size:>12,} bytes  {name:8} {wall:10,.1f} us a request, {cpu:10,.1f} us of the sender's CPU\n"
            )
        os.close(descriptor)


if __name__ == "__main__":
    main()
