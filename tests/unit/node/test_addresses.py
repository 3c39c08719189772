"""Listening: on the address that is asked for, or on those by which other hosts reach this one."""

from __future__ import annotations

import socket

import pytest

from rsb_cluster.errors import ConfigError
from rsb_cluster.node import addresses
from rsb_cluster.node.addresses import LOOPBACK, find_interface, listen, reachable_addresses

NOT_OURS = "192.0.2.1"  # TEST-NET-1


def test_it_listens_on_the_address_that_is_asked_for() -> None:
    ((listener, address),) = listen("127.0.0.2")
    with listener:
        assert address == listener.getsockname()[0] == "127.0.0.2"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOOPBACK, listener.getsockname()[1]))


def test_a_name_may_be_asked_for() -> None:
    ((listener, address),) = listen("localhost")
    with listener:
        assert address == "localhost"
        socket.create_connection(("localhost", listener.getsockname()[1])).close()


def test_it_listens_on_all_addresses_that_this_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a name stands for may be none: that of a host behind address translation."""
    monkeypatch.setattr(addresses, "reachable_addresses", lambda: [NOT_OURS, "127.0.0.2", "::1"])
    opened = listen("")
    assert [address for _, address in opened] == ["127.0.0.2", "::1"]
    for listener, address in opened:
        with listener:
            assert listener.getsockname()[0] == address
    with pytest.raises(OSError, match=f"{NOT_OURS}: "):
        listen(NOT_OURS)


def test_without_a_network_all_nodes_are_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reachable_addresses", "_global_addresses"):
        monkeypatch.setattr(addresses, name, list)
    ((listener, address),) = listen("")
    with listener:
        assert address == LOOPBACK


def test_a_public_address_is_listened_on_only_by_name_or_for_want_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "interface_addresses", lambda: {"eth0": "8.8.4.4", "eth1": "10.9.8.7"})
    monkeypatch.setattr(addresses, "_ipv6_addresses", lambda: ["2001:4860::1", "fd00::7", "fe80::1", "::1"])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    found = reachable_addresses()
    assert {"10.9.8.7", "fd00::7"} <= set(found)
    assert not {"8.8.4.4", "2001:4860::1", "fe80::1", "::1"} & set(found)
    assert addresses._global_addresses() == ["8.8.4.4", "2001:4860::1"]
    named = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.4.4", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: named)
    assert reachable_addresses()[0] == "8.8.4.4"


def test_other_hosts_do_not_reach_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Debian, where the name of a host stands for 127.0.1.1 in its own eyes."""
    named = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in ("127.0.1.1", "169.254.0.7", "10.9.8.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: named)
    found = reachable_addresses()
    assert found[0] == "10.9.8.7"
    assert not {"127.0.1.1", "169.254.0.7", LOOPBACK} & set(found)


def test_an_interface_is_found_by_its_address() -> None:
    assert find_interface(LOOPBACK) == "lo"
    with pytest.raises(ConfigError, match=f"has the address {NOT_OURS}"):
        find_interface(NOT_OURS)
