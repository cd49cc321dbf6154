"""Streams to every scheduler: the registration, then this worker's state with each scheduler's share of what is free.

All schedulers are told at the same moment, so that the shares never sum to more than what is free. A scheduler that
reads slowly gets only the newest state.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

import grpc.aio

from headrace.v1 import scheduler_pb2, scheduler_pb2_grpc
from services.common.channel import ReplicaSessions
from services.worker.capacity import Room

log = logging.getLogger(__name__)

_HEARTBEAT_S = 1.0
_COALESCE_S = 0.005  # a state is at most this old when it is sent; several steps of a small model share one
# What running sequences take as they grow, and prompts as they are computed, is told this often: it changes with nearly
# every step, and nobody waits for it.
_DRIFT_S = 0.05


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What schedulers are told of this worker."""

    step: int
    running: int
    waiting: int
    free_blocks: int
    pending_prefill_tokens: int
    free: Room
    draining: bool
    prefill_tokens_per_s: float
    role: scheduler_pb2.WorkerRole.ValueType
    prefix_queried_tokens: int
    prefix_hit_tokens: int

    @property
    def without_step(self) -> tuple[object, ...]:
        """What a state is worth sending for; what only grows can wait for the heartbeat."""
        return (*self.without_drift, self.pending_prefill_tokens, self.free)

    @property
    def without_drift(self) -> tuple[object, ...]:
        """What is worth sending at once."""
        return (self.running, self.waiting, self.free.sequences, self.draining, self.role)


class _Link:
    """One scheduler's stream: the newest state it has not been sent, and what was settled since the last one sent."""

    def __init__(self) -> None:
        self._state: scheduler_pb2.WorkerState | None = None
        self._settled: list[scheduler_pb2.PlacementKey] = []
        self._wake = asyncio.Event()

    def put(self, state: scheduler_pb2.WorkerState, settled: list[scheduler_pb2.PlacementKey]) -> None:
        self._state = state
        self._settled += settled
        self._wake.set()

    async def reports(self, registration: scheduler_pb2.Registration) -> AsyncIterator[scheduler_pb2.WorkerReport]:
        yield scheduler_pb2.WorkerReport(registration=registration)
        while True:
            await self._wake.wait()
            self._wake.clear()
            assert self._state is not None, "whoever wakes this has put a state"
            self._state.settled.extend(self._settled)
            self._settled = []
            yield scheduler_pb2.WorkerReport(state=self._state)


class SchedulerLinks:
    """Keeps every scheduler informed, and hears what they want. `load` gives the state of the moment."""

    def __init__(
        self,
        registration: scheduler_pb2.Registration,
        schedulers: Iterable[str],
        load: Callable[[], WorkerLoad],
        on_directive: Callable[[scheduler_pb2.WorkerDirective], None],
    ) -> None:
        self._registration = registration
        self._sessions = ReplicaSessions("scheduler", schedulers, self._session)
        self._load = load
        self._on_directive = on_directive
        self._links: list[_Link] = []
        # A placement is made by one scheduler, and the others do not know it; so all may be told of it.
        self._settled: list[scheduler_pb2.PlacementKey] = []
        self._last_sent: tuple[object, ...] = ()
        self._last_without_drift: tuple[object, ...] = ()
        self._sent_at = 0.0
        self._turn = 0
        # A timer rather than a task: it is set after each step, and what that costs is taken from the next one.
        self._timer: asyncio.TimerHandle | None = None
        self._looked_at = 0.0

    def settle(self, request_id: str, attempt: int) -> None:
        """A placement was started or refused: the next state reflects it."""
        self._settled.append(scheduler_pb2.PlacementKey(request_id=request_id, attempt=attempt))
        self.notify()

    def notify(self) -> None:
        """The load may have changed."""
        if self._timer is None:
            loop = asyncio.get_running_loop()
            wait_s = max(0.0, self._looked_at + _COALESCE_S - loop.time())
            self._timer = loop.call_later(wait_s, self._broadcast)

    async def run(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._sessions.run())
            tasks.create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            self._turn += 1
            self._broadcast(heartbeat=True)
            await asyncio.sleep(_HEARTBEAT_S)

    def _broadcast(self, *, heartbeat: bool = False) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._looked_at = asyncio.get_running_loop().time()
        load = self._load()
        if not (heartbeat or self._is_news(load)) or not self._links:
            return
        self._last_sent, self._last_without_drift = load.without_step, load.without_drift
        self._sent_at = self._looked_at
        settled, self._settled = self._settled, []
        for link, share in zip(self._links, load.free.share(len(self._links), self._turn), strict=True):
            link.put(_to_state(load, share), settled)

    def _is_news(self, load: WorkerLoad) -> bool:
        """What has only drifted is looked at again after the next step."""
        if self._settled or load.without_drift != self._last_without_drift:
            return True
        return self._looked_at - self._sent_at >= _DRIFT_S and load.without_step != self._last_sent

    async def _session(self, address: str, channel: grpc.aio.Channel) -> None:
        await channel.channel_ready()  # only a scheduler that is there gets a share
        log.info("registering with scheduler %s", address)
        link = _Link()
        call = scheduler_pb2_grpc.SchedulerStub(channel).Register(link.reports(self._registration))
        self._links.append(link)
        self._last_without_drift = ()  # the shares are others now
        self.notify()
        try:
            async for directive in call:
                self._on_directive(directive)
        finally:
            self._links.remove(link)
            self._last_without_drift = ()
            self.notify()
            call.cancel()


def _to_state(load: WorkerLoad, share: Room) -> scheduler_pb2.WorkerState:
    free = share if not load.draining else Room(0, 0, 0)
    return scheduler_pb2.WorkerState(
        step=load.step,
        running_sequences=load.running,
        waiting_sequences=load.waiting,
        free_blocks=load.free_blocks,
        pending_prefill_tokens=load.pending_prefill_tokens,
        credits=scheduler_pb2.Credits(sequences=free.sequences, blocks=free.blocks, prefill_tokens=free.prefill_tokens),
        draining=load.draining,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        role=load.role,
        prefix_queried_tokens=load.prefix_queried_tokens,
        prefix_hit_tokens=load.prefix_hit_tokens,
    )
