"""What the machines spent on one request so far: each of its sequences reports once, at its end or soon after it."""

import asyncio
import contextlib
from collections.abc import Callable

from headrace.v1.machine_time_pb2 import MachineTime
from headrace.v1.worker_pb2 import SequenceTime
from services.common.machine_costs import MachineCosts

# A sequence that a stop string ended is told of when its engine has made the step that it is in.
_LONGEST_STEP_S = 1.0


class Spending:
    """Of one request. Knows nothing of streams: links tell it what comes."""

    def __init__(self) -> None:
        self.costs = MachineCosts()
        self.priced = False
        """A worker that runs it, or ran it, has a price."""
        self._missing = 0
        self._complete = asyncio.Event()
        self._complete.set()
        self._then: Callable[[], None] | None = None

    def expect(self) -> None:
        """A sequence was started; `receive` or `lose` follows."""
        self._missing += 1
        self._complete.clear()

    def receive(self, told: SequenceTime, price_per_hour: float | None) -> None:
        """What a sequence took on a worker of that price, and on those that computed its prompt."""
        self._spend(told.time, price_per_hour or 0.0)
        for elsewhere in told.elsewhere:
            self.priced = self.priced or elsewhere.price_per_hour > 0
            self._spend(elsewhere.time, elsewhere.price_per_hour)
        self.lose()

    def lose(self) -> None:
        """Nothing more will be heard of a sequence."""
        self._missing -= 1
        if not self._missing:
            self._complete.set()
            if self._then is not None:
                self._then()

    async def told(self) -> None:
        """Waits until every sequence has reported, if that is money; not longer than a step takes."""
        if self.priced and self._missing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LONGEST_STEP_S):
                    await self._complete.wait()

    def close(self, then: Callable[[], None]) -> None:
        """The request has ended: calls `then` once everything is known, now or later."""
        if self._missing:
            self._then = then
        else:
            then()

    def _spend(self, time: MachineTime, price_per_hour: float) -> None:
        self.costs.spend(time.prefill_ns, time.decode_ns, price_per_hour, time.saved_prefix_ns)
