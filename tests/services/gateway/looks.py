"""The looks with which a gateway finds out whether a client reads, in a test's hands: no test waits for a time."""

import asyncio
from collections.abc import Callable
from functools import partial

import pytest

# A time that never comes.
WRITE_TIMEOUT_S = 12_345.0
Look = Callable[[], object]


class Looks:
    """Timers of the running loop that look whether a client reads, in a test's hands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._due: asyncio.Queue[tuple[asyncio.TimerHandle, Look]] = asyncio.Queue()
        self._call_later = asyncio.get_running_loop().call_later
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", self._later)

    def _later(self, seconds: float, callback: Callable[..., object], *args: object) -> asyncio.TimerHandle:
        handle = self._call_later(seconds, callback, *args)
        if seconds == WRITE_TIMEOUT_S:
            self._due.put_nowait((handle, partial(callback, *args)))
        return handle

    async def next(self) -> Look:
        """The next look, once something waits for the client."""
        handle, look = await asyncio.wait_for(self._due.get(), 10)
        handle.cancel()
        return look

    @property
    def none_is_due(self) -> bool:
        return self._due.empty()

    async def were_enough(self) -> bool:
        """Looks once; whether no further look is due, for who is looked at is cut."""
        (await self.next())()
        return self.none_is_due
