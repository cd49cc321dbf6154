"""Public ports are checked with a sentence that helps; internal ones are free and differ."""

import socket
from itertools import islice

import pytest

from toolkit.ports import PortTaken, choose_public_port, free_ports

HOST = "127.0.0.1"


def test_a_taken_port_is_named_with_its_flag() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"{HOST}:{port} \(Address already in use\).*--http-port"):
            choose_public_port(HOST, port, "--http-port")


def test_a_free_port_is_itself_and_zero_is_any() -> None:
    port = choose_public_port(HOST, 0, "--http-port")
    assert port > 0
    assert choose_public_port(HOST, port, "--http-port") == port


def test_free_ports_differ() -> None:
    ports = list(islice(free_ports(HOST), 20))
    assert len(set(ports)) == 20


def test_ports_that_are_spoken_for_are_avoided() -> None:
    spoken_for = set(islice(free_ports(HOST), 12_000))
    assert spoken_for.isdisjoint(islice(free_ports(HOST, spoken_for), 100))
