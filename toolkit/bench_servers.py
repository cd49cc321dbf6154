"""The servers that rows are run on, of which one runs at a time.

A server whose process is known is stopped, with all that it started, while another one is measured: two servers that
share the cores would both be measured wrongly.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from toolkit.process_tree import ProcessTree

# A stack that stood still for minutes has lost its leases and its connections, and makes new ones.
_RECOVERY_DEADLINE_S = 120.0
_ASK_EVERY_S = 0.2


class NotAnswering(Exception):
    """A server does not answer; the message says which and how it was asked."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server under test. `answers` tells whether it is ready to be measured, and never raises."""

    name: str
    url: str
    # None: a process that is not ours to stop.
    tree: ProcessTree | None
    answers: Callable[[], Awaitable[bool]]


class Turns:
    """Gives servers their turns, one at a time. At the end of the `with` all of them run."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._trees = [server.tree for server in servers if server.tree is not None]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tree in self._trees:
            tree.go_on()

    async def give(self, server: Server) -> None:
        """Returns when all others have stopped and this one answers. Raises NotStopped, NotAnswering."""
        for tree in self._trees:
            if tree is not server.tree:
                await tree.stop()
        if server.tree is not None:
            server.tree.go_on()
        await _wait_answers(server)


async def _wait_answers(server: Server) -> None:
    try:
        async with asyncio.timeout(_RECOVERY_DEADLINE_S):
            while True:
                if await server.answers():
                    return
                await asyncio.sleep(_ASK_EVERY_S)
    except TimeoutError:
        waited = f"{_RECOVERY_DEADLINE_S:.0f} s"
        raise NotAnswering(f"{server.name} at {server.url} did not answer within {waited} of its turn") from None
