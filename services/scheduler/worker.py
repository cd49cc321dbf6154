"""One connected worker: how it does, what of its credits is spoken for, and what placement sees of it.

Its grant counts what is free now, so this scheduler subtracts the placements it has made since that the grant does not
reflect yet.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from headrace.v1 import scheduler_pb2
from services.common.channel import Outbox
from services.scheduler.breaker import Breaker, State
from services.scheduler.kv_plans import Candidate, Credits, Role
from services.scheduler.outstanding import Outstanding, PlacementKey

Condition = Literal["healthy", "draining", "drained", "silent", "breaker_open", "breaker_half_open"]
"""As `FleetWorker.Condition` has it."""

_CONDITIONS: dict[State, Condition] = {
    "closed": "healthy",
    "open": "breaker_open",
    "half_open": "breaker_half_open",
}
_ROLES: dict[int, Role] = {
    scheduler_pb2.WORKER_ROLE_PREFILL: "prefill",
    scheduler_pb2.WORKER_ROLE_DECODE: "decode",
}


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. `silence_s`: without a report, until a worker gets no work; `placement_s`: until a placement that it has
    not reported is not on its way any more.
    """

    silence_s: float
    placement_s: float


@dataclass(slots=True)
class KnownRate:
    """How fast workers of one model compute prompts. A worker that has computed none yet is taken for its like: a guess
    beside what others have measured would send it prompts, or keep them away, for no reason.
    """

    tokens_per_s: float = 500.0
    """What the last one said that knows; before that, a small model on a small CPU."""


@dataclass(slots=True, eq=False)
class Worker:
    """Whoever opened its stream holds it and gives it back to the fleet. `now` is by the breaker's clock."""

    registration: scheduler_pb2.Registration
    breaker: Breaker
    patience: Patience
    heard_at: float
    rate: KnownRate
    """Of its model."""
    state: scheduler_pb2.WorkerState | None = None
    reports: int = 0
    """Counts its states, so that "has reported since" can be asked."""
    outbox: Outbox[scheduler_pb2.WorkerDirective] = field(default_factory=Outbox)
    _outstanding: Outstanding = field(init=False)
    _lone: bool = False
    """Its last placement has to be alone, and it has had no room since."""
    _candidate: Candidate | None = None
    """As placement sees it, until something changes: a fleet of a thousand is looked at for every job."""
    _candidate_until: float = 0.0

    def __post_init__(self) -> None:
        self._outstanding = Outstanding(self.patience.placement_s)

    @property
    def id(self) -> str:
        return self.registration.worker_id

    @property
    def incarnation(self) -> str:
        return self.registration.incarnation

    @property
    def model(self) -> str:
        return self.registration.model.name

    def take_over(self, old: "Worker") -> None:
        """It is a new stream of the same process: placements are on their way, and its failures were its own."""
        self._outstanding, self.breaker, self._lone = old._outstanding, old.breaker, old._lone

    def report(self, state: scheduler_pb2.WorkerState, now: float) -> None:
        """Takes in its state."""
        self.state, self.heard_at = state, now
        self.reports += 1
        self.rate.tokens_per_s = state.prefill_tokens_per_s or self.rate.tokens_per_s
        for settled in state.settled:
            self._outstanding.remove((settled.request_id, settled.attempt))
        self.changed()

    def reserve(self, key: PlacementKey, cost: Credits, now: float, *, alone: bool) -> None:
        """Counts a placement until it is reported, settled or too old. It is the probe of a half-open breaker.

        `alone`: it takes the whole worker until it has ended.
        """
        if self.breaker.state == "half_open":
            self.breaker.begin_probe(key)
        self._outstanding.add(key, cost, now)
        self._lone = alone
        self.changed()

    def settle(self, key: PlacementKey) -> None:
        """Ends a placement that will not reach the worker."""
        self._outstanding.remove(key)
        self.breaker.withdraw_probe(key)
        self.changed()

    def changed(self) -> None:
        """It is to be looked at anew."""
        self._candidate = None

    def condition(self, now: float) -> Condition:
        state = self.state
        if state is None or now - self.heard_at > self.patience.silence_s:
            return "silent"
        if state.draining:
            return "draining" if state.running_sequences or state.waiting_sequences else "drained"
        return _CONDITIONS[self.breaker.state]

    def candidate(self, now: float) -> Candidate | None:
        """As placement sees it; None until it has reported."""
        if self.state is not None and (self._candidate is None or now > self._candidate_until):
            self._candidate = self._to_candidate(self.state, now)
            self._candidate_until = self._changes_at()
        return self._candidate

    def _changes_at(self) -> float:
        """When time alone makes it another candidate."""
        silent = self.heard_at + self.patience.silence_s
        known_silent = self._candidate is not None and not self._candidate.healthy
        placements = self._outstanding.next_is_old_at()
        return min(placements, math.inf if known_silent else silent, self.breaker.changes_at)

    def _to_candidate(self, state: scheduler_pb2.WorkerState, now: float) -> Candidate:
        registration, condition = self.registration, self.condition(now)
        self._outstanding.forget_old(now)
        spoken_for = self._outstanding.total
        sequences = state.running_sequences + state.waiting_sequences
        granted = Credits(state.credits.sequences, state.credits.blocks, state.credits.prefill_tokens)
        credits = granted - spoken_for
        self._lone = self._lone and credits.sequences <= 0
        return Candidate(
            id=self.id,
            incarnation=self.incarnation,
            kv_format=registration.kv_format,
            block_size=registration.model.block_size,
            block_bytes=registration.block_bytes,
            max_sequences=registration.max_sequences,
            total_blocks=registration.total_blocks,
            healthy=condition in ("healthy", "breaker_half_open") and self.breaker.takes_work,
            probe=condition == "breaker_half_open",
            role=_ROLES.get(state.role or registration.role, "both"),
            credits=credits,
            free_blocks=state.free_blocks - sequences - spoken_for.blocks,
            sequences=sequences + spoken_for.sequences,
            pending_prefill_tokens=state.pending_prefill_tokens + spoken_for.prefill_tokens,
            prefill_tokens_per_s=state.prefill_tokens_per_s or self.rate.tokens_per_s,
            deterministic=registration.deterministic,
            lone=self._lone,
        )
