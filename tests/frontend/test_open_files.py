"""The limit on open files that a server is started with does not keep clients waiting."""

import resource
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.serving import Server
from tests.soak_clients import connect

ROOM = 64  # beside the files that this process has open already


@contextmanager
def few_files():
    """Let what is started within open few files, unless it asks for more; give how many."""
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = len(list(Path("/proc/self/fd").iterdir())) + ROOM
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    try:
        yield files
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


def test_more_connections_are_served_than_files_may_be_open_by_default(tmp_path):
    with few_files() as files:
        server = Server(tmp_path, "--max-connections", str(2 * files))
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(2 * files)]
        for connection in connections:
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert {connection.recv(12) for connection in connections} == {b"HTTP/1.1 200"}
        one_more = stack.enter_context(connect(server))
        assert one_more.recv(12) == b"HTTP/1.1 503"
    assert server.stop() == 0
