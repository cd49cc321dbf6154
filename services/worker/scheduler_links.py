"""Streams to every scheduler: the registration, then this worker's state with each scheduler's share of what is free.

All schedulers are told at the same moment, so that the shares never sum to more than what is free. A scheduler that
reads slowly gets only the newest state.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

import grpc.aio

from headrace.v1 import scheduler_pb2, scheduler_pb2_grpc
from services.common.channel import ReplicaSessions
from services.worker.capacity import Room

log = logging.getLogger(__name__)

_HEARTBEAT_S = 1.0
# What schedulers wait for is told within this time; several steps of a small model share one message.
_COALESCE_S = 0.005
# All else is told this often. What takes room is known to whoever placed it, and what running sequences take as they
# grow, and prompts as they are computed, changes with nearly every step.
_DRIFT_S = 0.05
# So many sequences are room enough for a scheduler, for the moment.
_PLENTY = 16
_CLOCK_S = 0.001  # uvloop's clock tells whole milliseconds


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
        return (self.running, self.waiting, self.pending_prefill_tokens, self.free, self.draining, self.role)


@dataclass(slots=True)
class Settled:
    """Placements that were started or refused since schedulers were told of the load, and what they took at most."""

    keys: list[scheduler_pb2.PlacementKey] = field(default_factory=list)
    sequences: int = 0
    blocks: int = 0
    prefill_tokens: int = 0


def wait_for(load: WorkerLoad, last: WorkerLoad | None, settled: Settled, schedulers: int) -> float:
    """How many seconds after the last one a state is to be told, at least; infinitely many if it is no news.

    `last`: what was told, if the shares are still the same.
    """
    if last is None or (load.draining, load.role) != (last.draining, last.role):
        return 0
    if not settled.keys and load.without_step == last.without_step:
        return math.inf
    if load.free.sequences <= last.free.sequences - settled.sequences:
        return _DRIFT_S
    # There is more room than schedulers count on; they can wait while each has plenty, whoever placed what was settled.
    plenty = (
        last.free.sequences // schedulers - settled.sequences >= _PLENTY
        and 2 * (last.free.blocks - settled.blocks) >= load.free.blocks
        and 2 * (last.free.prefill_tokens - settled.prefill_tokens) >= load.free.prefill_tokens
    )
    return _DRIFT_S if plenty else 0


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
        self._settled = Settled()
        self._last_sent: WorkerLoad | None = None  # none: the shares are others now
        self._sent_at = 0.0
        self._turn = 0
        # A timer rather than a task: it is set after each step, and what that costs is taken from the next one.
        self._timer: asyncio.TimerHandle | None = None
        self._looked_at = 0.0
        # For what can wait, in case that no other step comes.
        self._later: asyncio.TimerHandle | None = None

    def settle(self, request_id: str, attempt: int, sequences: int, prompt_tokens: int) -> None:
        """A placement was started or refused: the next state reflects it."""
        settled = self._settled
        settled.keys.append(scheduler_pb2.PlacementKey(request_id=request_id, attempt=attempt))
        settled.sequences += sequences
        settled.blocks += -(-prompt_tokens // self._registration.model.block_size)
        settled.prefill_tokens += prompt_tokens
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
        for timer in (self._timer, self._later):
            if timer is not None:
                timer.cancel()
        self._timer = self._later = None
        loop = asyncio.get_running_loop()
        self._looked_at = loop.time()
        load = self._load()
        wait_s = 0.0 if heartbeat else wait_for(load, self._last_sent, self._settled, len(self._links))
        due = max(self._looked_at, self._sent_at + wait_s)
        if not self._links or due == math.inf:
            return
        if due > self._looked_at + _CLOCK_S:
            self._later = loop.call_at(due, self._broadcast)
            return
        self._last_sent, self._sent_at = load, self._looked_at
        settled, self._settled = self._settled, Settled()
        for link, share in zip(self._links, load.free.share(len(self._links), self._turn), strict=True):
            link.put(_to_state(load, share), settled.keys)

    async def _session(self, address: str, channel: grpc.aio.Channel) -> None:
        await channel.channel_ready()  # only a scheduler that is there gets a share
        log.info("registering with scheduler %s", address)
        link = _Link()
        call = scheduler_pb2_grpc.SchedulerStub(channel).Register(link.reports(self._registration))
        self._links.append(link)
        self._last_sent = None
        self.notify()
        try:
            async for directive in call:
                self._on_directive(directive)
        finally:
            self._links.remove(link)
            self._last_sent = None
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
