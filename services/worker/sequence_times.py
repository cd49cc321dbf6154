"""Tells each gateway what the engine spent on its sequences, once the engine has let go of them.

Every sequence started on a stream is told of once. Runs on the event loop; knows no streams but who a sequence's
`Ticket` belongs to.
"""

import asyncio
import contextlib
from collections.abc import Sequence as Items

from headrace.v1.machine_time_pb2 import MachineTime, PricedTime
from headrace.v1.worker_pb2 import SequenceTime
from services.worker.engine.counters import EngineCounters
from services.worker.engine.sequence import Sequence


class SequenceTimes:
    """Which handles of which streams the engine still has, and what it spent on those that left."""

    def __init__(self) -> None:
        self._in_engine = 0
        self._told = asyncio.Event()
        self._told.set()

    def entered(self, sequences: Items[Sequence]) -> None:
        """They go to the engine; `left` follows for each."""
        self._in_engine += len(sequences)
        self._told.clear()

    def left(
        self,
        handle: int,
        sequence: Sequence,
        cached_tokens: int,
        elsewhere: Items[PricedTime],
        counters: EngineCounters,
    ) -> SequenceTime:
        """What to tell of a sequence that the engine let go of, which computed none of `cached_tokens`."""
        self._in_engine -= 1
        if not self._in_engine:
            self._told.set()
        # A prompt token that is not computed saves what one has taken so far.
        saved_ns = cached_tokens * counters.prefill_ns // max(1, counters.prefill_tokens)
        time = MachineTime(prefill_ns=sequence.prefill_ns, decode_ns=sequence.decode_ns, saved_prefix_ns=saved_ns)
        return SequenceTime(handle=handle, time=time, elsewhere=elsewhere)

    async def wait_told(self, timeout_s: float) -> None:
        """Returns when the engine has none any more, or after that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._told.wait()
