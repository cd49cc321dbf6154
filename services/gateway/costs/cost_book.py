"""Adds up what requests cost, in metrics and in Redis: there per day, API key and model.

Redis is written once a second and not once per request. What could not be written waits and is sent again, and is
counted once.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime

from services.common.errors import Unavailable, failures_logged
from services.common.machine_costs import MachineCosts
from services.common.redis.costs import CostKey, CostStore
from services.gateway.active_request import ActiveRequest
from services.gateway.costs.metrics import CostMetrics

log = logging.getLogger(__name__)

_WRITE_EVERY_S = 1.0


@dataclass(slots=True)
class _Page:
    """What is to be added to a day."""

    day: date
    costs: dict[CostKey, MachineCosts] = field(default_factory=dict)
    # Its number, from the first time that it is sent on: then nothing is added to it any more.
    batch: int | None = None


class CostBook:
    """The costs of this gateway's requests. `run` writes them down."""

    def __init__(
        self,
        store: CostStore,
        metrics: CostMetrics,
        *,
        writer: str,
        keep_days: int,
        today: Callable[[], date] = lambda: datetime.now(UTC).date(),
    ) -> None:
        """`writer` names this process and no other."""
        self._store = store
        self._metrics = metrics
        self._writer = writer
        self._keep_days = keep_days
        self._today = today
        self._pages: deque[_Page] = deque()
        self._batch = 0
        self._writing = asyncio.Lock()
        self._open = 0
        self._all_known = asyncio.Event()
        self._all_known.set()

    def close(self, active: ActiveRequest) -> None:
        """The request has ended, or goes on on another gateway: enters it once its workers have told everything."""
        if active.placed_at is None:
            return  # nobody has computed anything
        self._open += 1
        self._all_known.clear()
        active.spending.close(lambda: self._enter(active))

    async def run(self) -> None:
        """Writes what has come up, every second, until cancelled."""
        while True:
            await asyncio.sleep(_WRITE_EVERY_S)
            with failures_logged(log, "costs could not be written"), contextlib.suppress(Unavailable):
                await self.write()

    async def write(self) -> None:
        """Writes everything that is known. Raises Unavailable; what was not written then waits."""
        async with self._writing:
            for page in list(self._pages):
                if page.batch is None:
                    self._batch += 1
                    page.batch = self._batch
                await self._store.add(
                    page.day, page.costs, writer=self._writer, batch=page.batch, keep_days=self._keep_days
                )
                self._pages.popleft()

    async def wait_written(self, timeout_s: float) -> None:
        """Waits for what workers have still to tell, then writes it."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._all_known.wait()
        except TimeoutError:
            log.warning("%d ended requests have costs that their workers did not tell", self._open)
        with failures_logged(log, "costs could not be written"), contextlib.suppress(Unavailable):
            await self.write()

    def _enter(self, active: ActiveRequest) -> None:
        self._open -= 1
        if not self._open:
            self._all_known.set()
        costs = active.spending.costs
        if not active.abandoned:  # else it counts where it ends
            usage = active.usage()
            costs.requests = 1
            costs.prompt_tokens = usage.prompt_tokens
            costs.cached_prompt_tokens = usage.cached_prompt_tokens
            costs.completion_tokens = usage.completion_tokens
        self._metrics.observe(active.request.model.name, costs)
        key = CostKey(active.request.caller.key_id, active.request.model.name)
        self._page().setdefault(key, MachineCosts()).add(costs)

    def _page(self) -> dict[CostKey, MachineCosts]:
        """What is added to now."""
        day = self._today()
        if not self._pages or self._pages[-1].day != day or self._pages[-1].batch is not None:
            self._pages.append(_Page(day))
        return self._pages[-1].costs
