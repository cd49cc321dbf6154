"""Connections between services: channels with agreed keep-alive, and sessions kept with every replica of a service."""

import asyncio
import contextlib
import ipaddress
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

import grpc
import grpc.aio

from services.common.mutual_tls import CHANNEL_OPTIONS, channel_credentials
from services.common.tls import FrontCert

log = logging.getLogger(__name__)

M = TypeVar("M")

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_PING_EVERY_MS = 10_000
# What nobody is in a hurry for waits so long for a message to travel with: each costs both sides more than its content.
_COMPANY_WITHIN_S = 0.05

# A silent stream is pinged, and the server side allows that rate: a client that pings more often than the server's
# policy allows is cut off with "too many pings".
CLIENT_OPTIONS = (
    ("grpc.keepalive_time_ms", _PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A block of KV in one or two frames instead of dozens.
    ("grpc.http2.max_frame_size", 1024 * 1024),
    ("grpc.http2.write_buffer_size", 4 * 1024 * 1024),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
)
SERVER_OPTIONS = (
    ("grpc.keepalive_time_ms", _PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_EVERY_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A block of KV in one or two frames instead of dozens.
    ("grpc.http2.max_frame_size", 1024 * 1024),
    ("grpc.http2.write_buffer_size", 4 * 1024 * 1024),
    ("grpc.so_reuseport", 0),
)

Session = Callable[[str, grpc.aio.Channel], Awaitable[None]]
"""Talks to the replica at an address over a channel until the connection ends: returns, or raises AioRpcError."""


def host_port(host: str, port: int) -> str:
    """`host:port`, as gRPC and URLs want it: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def dial(address: str) -> grpc.aio.Channel:
    """A channel to the service at `host:port`; connects when it is first used."""
    credentials = channel_credentials()
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
    return grpc.aio.secure_channel(address, credentials, options=(*CLIENT_OPTIONS, *CHANNEL_OPTIONS))


def dial_front(address: str, cert: FrontCert | None) -> grpc.aio.Channel:
    """A channel to the public front of a gateway; `cert`: the certificate that it shows, if it is on TLS.

    It is trusted under its own name: it need not be for the address at which its own machine reaches it.
    """
    if cert is None:
        return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
    options = (*CLIENT_OPTIONS, ("grpc.ssl_target_name_override", cert.name))
    return grpc.aio.secure_channel(address, cert.channel_credentials(), options=options)


async def resolve(address: str) -> set[str]:
    """All `ip:port` behind `host:port`. Raises socket.gaierror when the name cannot be looked up now.

    A name with IPv4 addresses stands for those alone: "localhost" would otherwise name every replica twice.
    """
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    entries = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    ipv4 = {f"{endpoint[0]!s}:{port}" for family, *_, endpoint in entries if family == socket.AF_INET}
    return ipv4 or {f"[{endpoint[0]!s}]:{port}" for *_, endpoint in entries}


async def reachable(host: str, port: int) -> str:
    """The `host:port` under which others can reach a server that listens here.

    A server on all interfaces is reached at the address that this machine's own name stands for, or at that name where
    it means only this machine itself, as on Debian.
    """
    if host not in ("0.0.0.0", "::"):
        return host_port(host, port)
    own = f"{socket.gethostname()}:{port}"
    addresses: set[str] = set()
    with contextlib.suppress(socket.gaierror):
        addresses = await resolve(own)
    return min((address for address in addresses if not _is_loopback(address)), default=own)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.rpartition(":")[0].strip("[]")).is_loopback


class ReplicaSessions:
    """Keeps one session with every replica behind a list of addresses.

    The addresses are looked up again every `refresh_s` seconds: a replica that appears gets a session, one that
    vanishes loses it. While a name cannot be looked up it stands for what it stood for before. A session that ends is
    started again with exponential backoff and jitter.
    """

    def __init__(self, name: str, addresses: Iterable[str], session: Session, *, refresh_s: float = 5.0) -> None:
        self._name = name
        self._addresses = tuple(addresses)
        self._session = session
        self._refresh_s = refresh_s
        self._found: dict[str, set[str]] = {}  # what each address stood for when it was last looked up
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Runs until cancelled."""
        try:
            while True:
                self._follow(await self._look_up())
                await asyncio.sleep(self._refresh_s if self._tasks else min(self._refresh_s, 0.5))
        finally:
            self._follow(set())

    async def _look_up(self) -> set[str]:
        for address in self._addresses:
            with contextlib.suppress(socket.gaierror):
                self._found[address] = await resolve(address)
        return set().union(*self._found.values())

    def _follow(self, addresses: set[str]) -> None:
        for gone in self._tasks.keys() - addresses:
            self._tasks.pop(gone).cancel()
        for new in addresses - self._tasks.keys():
            self._tasks[new] = asyncio.create_task(self._keep(new), name=f"{self._name} {new}")

    async def _keep(self, address: str) -> None:
        backoff_s = 0.1
        while True:
            started = asyncio.get_running_loop().time()
            async with dial(address) as channel:
                await self._run_once(address, channel)
            if asyncio.get_running_loop().time() - started > 5.0:
                backoff_s = 0.1
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))
            backoff_s = min(backoff_s * 2, 2.0)

    async def _run_once(self, address: str, channel: grpc.aio.Channel) -> None:
        try:
            await self._session(address, channel)
        except grpc.aio.AioRpcError as error:
            log.info("%s %s: connection ended: %s %s", self._name, address, error.code().name, error.details())
        except Exception:
            log.exception("%s %s: session failed", self._name, address)


class Channels:
    """Channels to addresses that come and go. Beyond `most` of them, the one unused for longest is closed."""

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._channels: dict[str, grpc.aio.Channel] = {}  # least recently used first
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.pop(address, None)
        self._channels[address] = channel = channel if channel is not None else dial(address)
        if len(self._channels) > self._most:
            oldest = self._channels.pop(next(iter(self._channels)))
            task = asyncio.create_task(oldest.close(grace=60.0))  # calls on it may still run
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        return channel

    async def close(self) -> None:
        channels, self._channels = list(self._channels.values()), {}
        await cancel_and_wait(self._closing)
        await asyncio.gather(*(channel.close() for channel in channels))


class Outbox(Generic[M]):
    """The sending half of a bidirectional stream: `put` from anywhere on the loop, iterate to send.

    A stream that must not block its producers needs one; gRPC reads it at the pace of the connection.
    """

    def __init__(self, merge: Callable[[M, M], bool] | None = None) -> None:
        """`merge(message, next)`: adds to a message what was put after it, before it is sent; False: that cannot be."""
        self._queue: asyncio.Queue[M | None] = asyncio.Queue()
        self._merge = merge
        # Put without hurry, and the timer that ends their wait.
        self._patient: list[M] = []
        self._timer: asyncio.TimerHandle | None = None
        # Taken from the queue, since the message before could not have it.
        self._next: M | None = None

    def put(self, message: M, *, hurry: bool = True) -> None:
        """Messages go out in the order of the calls. One without hurry waits for one with, for a while."""
        if hurry:
            self._end_wait()
            self._queue.put_nowait(message)
            return
        self._patient.append(message)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_COMPANY_WITHIN_S, self._end_wait)

    def close(self) -> None:
        """Ends the iteration after what has been put."""
        self._end_wait()
        self._queue.put_nowait(None)

    def _end_wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for message in self._patient:
            self._queue.put_nowait(message)
        self._patient.clear()

    def __aiter__(self) -> "Outbox[M]":
        return self

    async def __anext__(self) -> M:
        message, self._next = self._next, None
        if message is None:
            message = await self._queue.get()
        if message is None:
            raise StopAsyncIteration
        if self._merge is not None:
            self._add_more(message, self._merge)
        return message

    def _add_more(self, message: M, merge: Callable[[M, M], bool]) -> None:
        while not self._queue.empty():
            more = self._queue.get_nowait()
            if more is None:
                self._queue.put_nowait(None)  # it ends after this message
                return
            if not merge(message, more):
                self._next = more
                return


async def cancel_and_wait(tasks: Iterable["asyncio.Task[object]"]) -> None:
    """Cancels tasks and waits until each has ended. What one had failed of is logged."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            log.error("a task failed before it was to end", exc_info=outcome)
