"""Passing connections on: all bytes both ways, many at a time, and an end on each side ends both."""

from __future__ import annotations

import socket
import threading

import pytest

from rsb_cluster.node.relay import Relay

GUARD_S = 1800.0


def receive(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size and (part := connection.recv(1 << 16)):
        content += part
    return content


def test_bytes_go_both_ways_and_an_end_is_passed_on() -> None:
    service = socket.create_server(("127.0.0.1", 0))
    listeners = [socket.create_server(("127.0.0.2", 0)), socket.create_server(("::1", 0), family=socket.AF_INET6)]
    places = [listener.getsockname()[:2] for listener in listeners]
    relay = Relay(listeners, service.getsockname()[:2])
    pairs = []
    for place in places * 2:
        near = socket.create_connection(place, GUARD_S)
        far, _ = service.accept()
        far.settimeout(GUARD_S)
        pairs.append((near, far))
    content = bytes(range(256)) * 8192  # more than the buffers of the sockets
    for near, far in pairs:
        for sender, receiver in ((near, far), (far, near)):
            thread = threading.Thread(target=sender.sendall, args=(content,))
            thread.start()
            assert receive(receiver, len(content)) == content
            thread.join()
    pairs[0][0].close()
    assert pairs[0][1].recv(1) == b""
    pairs[1][1].close()
    assert pairs[1][0].recv(1) == b""
    relay.close()
    assert pairs[2][0].recv(1) == b"", "as after the end of the service itself"
    for place in places:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(place, GUARD_S)
    for end in (*(end for pair in pairs for end in pair), service):
        end.close()


def test_a_service_that_is_gone_ends_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        gone = service.getsockname()[:2]
    listener = socket.create_server(("127.0.0.2", 0))
    place = listener.getsockname()[:2]
    relay = Relay([listener], gone)
    with socket.create_connection(place, GUARD_S) as near:
        assert near.recv(1) == b""
    relay.close()
