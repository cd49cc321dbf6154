"""TCP ports for a stack: the public ones are checked, the internal ones chosen."""

import random
import socket
from collections.abc import Collection, Iterator

# Below the range that Linux gives to outgoing connections (32768 and up): a port from there may be taken by one while
# its service is being restarted, or a client that keeps dialling it may even connect to itself.
_CHOSEN_FROM = range(20_000, 32_768)


class PortTaken(Exception):
    """A public port cannot be listened on; the message names it and the flag that changes it."""


def choose_public_port(host: str, port: int, flag: str, avoid: Collection[int] = ()) -> int:
    """`port` itself, or a free one if it is 0. Raises PortTaken."""
    if port == 0:
        return next(free_ports(host, avoid))
    if problem := _bind_problem(host, port):
        raise PortTaken(
            f"Cannot listen on {host}:{port} ({problem}); choose another port with {flag}, 0 for a free one."
        )
    return port


def free_ports(host: str, avoid: Collection[int] = ()) -> Iterator[int]:
    """Free ports in random order, so that stacks that start at the same time choose different ones.

    `avoid` names ports that are spoken for but not listened on yet.
    """
    for port in random.sample(_CHOSEN_FROM, len(_CHOSEN_FROM)):
        if port not in avoid and not _bind_problem(host, port):
            yield port


def _bind_problem(host: str, port: int) -> str:
    """Why nobody can listen there now; empty if one can."""
    try:
        family, kind, protocol, _name, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are no listener
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return ""
