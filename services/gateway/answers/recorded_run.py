"""A recorded request while it runs on this gateway: its deltas so far, for any number of readers."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator

import msgspec

from services.common.errors import HeadraceError, RequestFailed, failures_logged
from services.gateway.answers.journal import Journal
from services.gateway.request import Delta

log = logging.getLogger(__name__)


class RecordedRun:
    """A recorded request that runs here, whoever listens."""

    def __init__(self, internal_id: str, journal: Journal) -> None:
        self.internal_id = internal_id
        self.journal = journal
        self._deltas: list[Delta] = []
        self._ended = False
        self._error: HeadraceError | None = None
        self._changed = asyncio.Event()

    async def collect(self, deltas: AsyncGenerator[Delta, None]) -> None:
        """Takes the deltas of the request until it ends."""
        try:
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    self._deltas.append(delta)
                    self._tell()
        except HeadraceError as error:
            self._error = error
            if not self.journal.accepted:
                await self.journal.discard(error)
        except Exception:
            log.exception("request %s failed", self.internal_id)
            self._error = RequestFailed("The server failed while it handled this request; its log says why.")
            await self._record_failure(self._error)
        finally:
            self._ended = True
            self._tell()

    async def deltas(self, position: int) -> AsyncGenerator[Delta, None]:
        """The deltas from a position on, as they come. Raises what the request ends in."""
        while True:
            changed = self._changed
            while position < len(self._deltas):  # more may come while one is read
                position += 1
                yield msgspec.structs.replace(self._deltas[position - 1])  # whoever gets it may change it
            if self._error is not None:
                raise self._error
            if self._ended:
                return
            await changed.wait()

    async def _record_failure(self, error: HeadraceError) -> None:
        """Lets nobody wait for what does not come: the queue's entry has ended, and so nobody adopts the answer."""
        with failures_logged(log, f"answer {self.journal.answer_id}: that it failed could not be recorded"):
            if self.journal.accepted:
                await self.journal.fail(error)
            else:
                await self.journal.discard(error)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
