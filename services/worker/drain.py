"""Whether this worker takes on work: it is in service, or drained at a person's wish, or about to end."""

import asyncio
import logging

from services.worker.executions import Executions
from services.worker.kv_export import Prefills

log = logging.getLogger(__name__)


class Drain:
    """Takes a worker out of service while its process stays up, and back; or out of it for good."""

    def __init__(self, executions: Executions, prefills: Prefills, grace_s: float) -> None:
        """`grace_s`: how long running work may go on here before it goes on elsewhere."""
        self._executions = executions
        self._prefills = prefills
        self._grace_s = grace_s
        self._draining: asyncio.Task[None] | None = None
        self._for_good = False

    def begin(self) -> None:
        """Takes on nothing more. A drain under way goes on as it is."""
        if not self._executions.draining:
            log.info("draining")
            self._executions.draining = True  # now, and not when the task runs: the next state says so
            self._draining = asyncio.create_task(self._hand_on(self._grace_s), name="drain")

    def undo(self) -> None:
        """Back into service, unless the worker is about to end. What still runs goes on here."""
        if self._executions.draining and not self._for_good:
            log.info("in service again")
            self._stop_waiting()
            self._executions.draining = False

    async def finish(self, grace_s: float) -> None:
        """Out of service for good: returns when nothing runs and all streams have ended."""
        self._for_good = True
        self._stop_waiting()
        await self._hand_on(grace_s)
        await self._executions.close_all()

    async def _hand_on(self, grace_s: float) -> None:
        await self._executions.drain(grace_s)
        self._prefills.give_up()

    def _stop_waiting(self) -> None:
        if self._draining is not None:
            self._draining.cancel()
