"""A port that is kept for several processes: theirs to listen on, and nobody else's."""

import socket

import pytest

from headrace.errors import InvalidOption
from headrace.ports import reserve_port


def test_a_reserved_port_takes_listeners_that_share_it_and_no_second_server():
    with reserve_port("--grpc-port", "127.0.0.1", 0) as held:
        address = held.getsockname()
        refused = f"--grpc-port {address[1]} on 127.0.0.1: cannot listen there"
        with pytest.raises(InvalidOption, match=refused):
            reserve_port("--grpc-port", "127.0.0.1", address[1])
        with (
            socket.create_server(address, reuse_port=True),
            socket.create_server(address, reuse_port=True),
            pytest.raises(InvalidOption, match=refused),
        ):
            reserve_port("--grpc-port", "127.0.0.1", address[1])


def test_connections_reach_the_listener_and_not_what_holds_the_port():
    with reserve_port("--grpc-port", "127.0.0.1", 0) as held:
        address = held.getsockname()
        with socket.create_server(address, reuse_port=True) as listener:
            for _ in range(20):
                with socket.create_connection(address), listener.accept()[0]:
                    pass


def test_an_address_that_is_not_ours_is_refused():
    with pytest.raises(InvalidOption, match=r"on 203\.0\.113\.1: cannot listen there"):
        reserve_port("--grpc-port", "203.0.113.1", 0)
