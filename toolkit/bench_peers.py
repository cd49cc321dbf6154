"""Other servers to compare with: `--peer NAME=URL[,PID]`, read and checked before anything starts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from urllib.parse import urlsplit

import psutil

from toolkit.bench_servers import NotAnswering, Server
from toolkit.loadtest import lists_models
from toolkit.process_tree import ProcessTree, processes_below

T = TypeVar("T", str, int)

OURS = "ours"


class BadPeer(Exception):
    """What was given as a peer cannot be one; the message says why, in one sentence."""


@dataclass(frozen=True, slots=True)
class Peer:
    """An OpenAI-compatible server. `pid`: its process, which is stopped with its children while others are measured."""

    name: str
    url: str
    pid: int | None


def parse_peers(texts: Sequence[str]) -> tuple[Peer, ...]:
    """Reads `NAME=URL[,PID]` items. Raises BadPeer."""
    peers = tuple(_parse_peer(text) for text in texts)
    if name := _twice([peer.name for peer in peers]):
        raise BadPeer(f"--peer: the name {name!r} is given twice.")
    if pid := _twice([peer.pid for peer in peers if peer.pid is not None]):
        raise BadPeer(f"--peer: the process {pid} is given twice.")
    return peers


async def peer_server(peer: Peer) -> Server:
    """The peer as a server to measure. Raises NotAnswering if it does not answer now."""
    await check_answers(f"--peer {peer.name}", peer.url)
    tree = None if peer.pid is None else ProcessTree(peer.pid)
    return Server(peer.name, peer.url, tree, partial(lists_models, peer.url))


async def check_answers(option: str, url: str) -> None:
    """Asks the server for its models. Raises NotAnswering, which names the option that gave it."""
    if not await lists_models(url):
        raise NotAnswering(f"{option}: {url} does not answer GET /v1/models with a list of models.")


def is_base_url(url: str) -> bool:
    """True for `http://host:port` without a path."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.path
    except ValueError:  # a port that is no number
        return False


def _twice(items: Sequence[T]) -> T | None:
    return next((item for item in items if items.count(item) > 1), None)


def _parse_peer(text: str) -> Peer:
    name, equals, rest = text.partition("=")
    url, comma, pid = rest.partition(",")
    if not name or not equals or not url or (comma and not pid):
        raise BadPeer(f"--peer: {text!r} is not of the form NAME=URL[,PID], as in vllm=http://127.0.0.1:8001,4242.")
    if name == OURS:
        raise BadPeer(f"--peer: the name {OURS!r} is taken by our own stack.")
    url = url.rstrip("/")
    if not is_base_url(url):
        raise BadPeer(f"--peer {name}: {url!r} is not a URL without a path, such as http://127.0.0.1:8001.")
    return Peer(name, url, parse_pid(name, pid) if pid else None)


def parse_pid(peer: str, text: str) -> int:
    """A process that can be measured. Raises BadPeer."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise BadPeer(f"--peer {peer}: the process id {text!r} is not a positive number.")
    pid = int(text)
    try:
        os.kill(pid, 0)
        if psutil.Process() in processes_below(psutil.Process(pid)):
            raise BadPeer(f"--peer {peer}: process {pid} started this benchmark, which would stop itself.")
    except PermissionError:
        raise BadPeer(f"--peer {peer}: process {pid} is another user's and cannot be stopped.") from None
    except (ProcessLookupError, OverflowError, psutil.NoSuchProcess):
        raise BadPeer(f"--peer {peer}: there is no process {pid}.") from None
    return pid
