"""What is known of each worker: who it is, how it does, and what of its credits is spoken for.

A worker is connected while its stream is open, and gets work while it is also heard from, not draining and of the
incarnation that registered last. Its grant counts what is free now, so this scheduler subtracts the placements it has
made since that the grant does not reflect yet. Knows no connection: the servicer feeds it, listeners are told.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

from headrace.v1 import scheduler_pb2
from services.common.channel import Outbox
from services.common.errors import InvalidRequest, NotFound
from services.scheduler.kv_plans import Candidate, Credits, Role

log = logging.getLogger(__name__)

_ROLES: dict[int, Role] = {
    scheduler_pb2.WORKER_ROLE_PREFILL: "prefill",
    scheduler_pb2.WORKER_ROLE_DECODE: "decode",
}
_ASSUMED_TOKENS_PER_S = 500.0  # of a worker that does not say

Clock = Callable[[], float]
Condition = Literal["healthy", "draining", "drained", "silent"]
"""A connected worker's, as `FleetWorker.Condition` has it."""
PlacementKey = tuple[str, int]
"""Request id and attempt."""


@dataclass(slots=True)
class _Outstanding:
    cost: Credits
    placed_at: float


@dataclass(slots=True, eq=False)
class Worker:
    """One connected worker. Whoever opened its stream holds it and gives it back to the fleet."""

    registration: scheduler_pb2.Registration
    heard_at: float
    state: scheduler_pb2.WorkerState | None = None
    reports: int = 0
    """Counts its states, so that "has reported since" can be asked."""
    outstanding: dict[PlacementKey, _Outstanding] = field(default_factory=dict)
    outbox: Outbox[scheduler_pb2.WorkerDirective] = field(default_factory=Outbox)
    candidate: Candidate | None = None
    """As placement sees it, until something changes: a fleet of a thousand is looked at for every job."""
    candidate_until: float = 0.0

    @property
    def id(self) -> str:
        return self.registration.worker_id

    @property
    def model(self) -> str:
        return self.registration.model.name


class Fleet:
    """All connected workers."""

    def __init__(self, *, silence_s: float, placement_timeout_s: float, clock: Clock = time.monotonic) -> None:
        self._silence_s = silence_s
        self._placement_timeout_s = placement_timeout_s
        self._clock = clock
        self._workers: dict[str, Worker] = {}
        self._on_report: Callable[[str], None] = lambda model: None
        self._on_catalog: Callable[[], None] = lambda: None

    def listen(self, *, on_report: Callable[[str], None], on_catalog: Callable[[], None]) -> None:
        """`on_report(model)` is called when a worker has reported or left, so that there may be more room;
        `on_catalog()` when the models or their addresses may have changed.
        """
        self._on_report = on_report
        self._on_catalog = on_catalog

    # --- the workers' side

    def register(self, registration: scheduler_pb2.Registration) -> Worker:
        """Takes in a worker, in place of what was known under its id. Raises InvalidRequest if it cannot serve."""
        self._check(registration)
        worker = Worker(registration, self._clock())
        old = self._workers.get(worker.id)
        if old is not None and old.registration.incarnation == registration.incarnation:
            worker.outstanding = old.outstanding  # a new stream of the same process: placements are still on their way
        self._workers[worker.id] = worker
        log.info("worker %s joined: %s at %s", worker.id, worker.model, registration.address)
        self._on_catalog()
        return worker

    def report(self, worker: Worker, state: scheduler_pb2.WorkerState) -> None:
        """Takes in a worker's state."""
        worker.state = state
        worker.candidate = None
        worker.heard_at = self._clock()
        worker.reports += 1
        for settled in state.settled:
            worker.outstanding.pop((settled.request_id, settled.attempt), None)
        self._on_report(worker.model)

    def leave(self, worker: Worker) -> None:
        """Takes out a worker whose stream has ended, unless a newer stream has replaced it."""
        if self._workers.get(worker.id) is not worker:
            return
        del self._workers[worker.id]
        log.info("worker %s left", worker.id)
        self._on_catalog()
        self._on_report(worker.model)

    def set_role(self, worker_id: str, role: scheduler_pb2.WorkerRole.ValueType) -> None:
        """Tells a worker what it is preferred for from now on. Raises NotFound if it is not connected."""
        self._find(worker_id).outbox.put(scheduler_pb2.WorkerDirective(set_role=role))

    def drain(self, worker_id: str, *, undo: bool) -> int:
        """Tells a worker to leave service, or to come back. Returns how many others take work of its model now.

        Raises NotFound if it is not connected.
        """
        worker = self._find(worker_id)
        worker.outbox.put(scheduler_pb2.WorkerDirective(set_draining=not undo))
        now = self._clock()
        others = (other for other in self._workers.values() if other is not worker and other.model == worker.model)
        return sum(self._condition(other, now) == "healthy" for other in others)

    # --- placement's side

    def candidates(self, model: str) -> list[Candidate]:
        """The model's workers that have reported, with what is left of their credits."""
        now = self._clock()
        return [
            self._candidate(worker, worker.state, now)
            if worker.candidate is None or now > worker.candidate_until
            else worker.candidate
            for worker in self._workers.values()
            if worker.state is not None and worker.model == model
        ]

    def reserve(self, worker_id: str, key: PlacementKey, cost: Credits) -> None:
        """Counts a placement against its worker until the worker reports it, `settle`, or a timeout."""
        worker = self._workers[worker_id]
        worker.outstanding[key] = _Outstanding(cost, self._clock())
        worker.candidate = None

    def settle(self, worker_id: str, key: PlacementKey) -> None:
        """Ends a placement that will not reach its worker."""
        worker = self._workers.get(worker_id)
        if worker is not None and worker.outstanding.pop(key, None) is not None:
            worker.candidate = None
            self._on_report(worker.model)

    def address(self, worker_id: str) -> str:
        return self._workers[worker_id].registration.address

    def reports(self, worker_id: str) -> int | None:
        """How often a worker has reported on its stream; None if it is not connected."""
        worker = self._workers.get(worker_id)
        return None if worker is None else worker.reports

    def serves(self, model: str) -> bool:
        """Whether a connected worker serves the model, be it healthy or not."""
        return any(worker.model == model for worker in self._workers.values())

    # --- everybody's side

    def catalog(self) -> scheduler_pb2.Catalog:
        """The models that connected workers serve, and where. A model's context is the shortest of its workers'."""
        entries: dict[str, scheduler_pb2.CatalogEntry] = {}
        for worker in self._workers.values():
            model = worker.registration.model
            entry = entries.setdefault(worker.model, scheduler_pb2.CatalogEntry(model=model))
            shortest = min(entry.model.max_context_tokens, model.max_context_tokens)
            entry.model.max_context_tokens = shortest
            entry.worker_addresses.append(worker.registration.address)
        return scheduler_pb2.Catalog(entries=[entries[name] for name in sorted(entries)])

    def describe(self) -> Iterator[scheduler_pb2.FleetWorker]:
        now = self._clock()
        for worker in self._workers.values():
            condition = self._condition(worker, now)
            yield scheduler_pb2.FleetWorker(
                registration=worker.registration,
                state=worker.state,
                healthy=condition == "healthy",
                condition=scheduler_pb2.FleetWorker.Condition.Value(f"CONDITION_{condition.upper()}"),
            )

    def count_conditions(self, model: str) -> dict[Condition, int]:
        """How many of the model's connected workers are in each condition."""
        now = self._clock()
        counts: dict[Condition, int] = dict.fromkeys(get_args(Condition), 0)
        for worker in self._workers.values():
            if worker.model == model:
                counts[self._condition(worker, now)] += 1
        return counts

    def _candidate(self, worker: Worker, state: scheduler_pb2.WorkerState, now: float) -> Candidate:
        healthy = self._condition(worker, now) == "healthy"
        worker.candidate = _candidate(worker, state, healthy, self._spoken_for(worker, now))
        # Time alone changes it when the worker has been silent, or a placement outstanding, for too long.
        ends = [placement.placed_at + self._placement_timeout_s for placement in worker.outstanding.values()]
        worker.candidate_until = min([*ends, worker.heard_at + self._silence_s if healthy else math.inf])
        return worker.candidate

    def _find(self, worker_id: str) -> Worker:
        worker = self._workers.get(worker_id)
        if worker is None:
            raise NotFound(f"No worker {worker_id} is connected to this scheduler.")
        return worker

    def _condition(self, worker: Worker, now: float) -> Condition:
        state = worker.state
        if state is None or now - worker.heard_at > self._silence_s:
            return "silent"
        if state.draining:
            return "draining" if state.running_sequences or state.waiting_sequences else "drained"
        return "healthy"

    def _spoken_for(self, worker: Worker, now: float) -> Credits:
        """What outstanding placements take. Those too old to be on their way any more are forgotten."""
        total = Credits()
        for key, placement in list(worker.outstanding.items()):
            if now - placement.placed_at > self._placement_timeout_s:
                del worker.outstanding[key]
            else:
                total += placement.cost
        return total

    def _check(self, registration: scheduler_pb2.Registration) -> None:
        model = registration.model
        if not (registration.worker_id and registration.incarnation and registration.address and model.name):
            raise InvalidRequest("A registration needs worker_id, incarnation, address and a model's name.")
        if model.block_size < 1 or model.max_context_tokens < 1:
            raise InvalidRequest("A model's block_size and max_context_tokens are at least 1.", field="model")
        for worker in self._workers.values():
            other = worker.registration.model
            same = (other.tokenizer_hash, other.block_size) == (model.tokenizer_hash, model.block_size)
            if worker.id != registration.worker_id and other.name == model.name and not same:
                # Gateways tokenize and hash once for all workers of a model.
                raise InvalidRequest(
                    f"Worker {worker.id} serves {model.name} with another tokenizer or block size.", field="model"
                )


def _candidate(worker: Worker, state: scheduler_pb2.WorkerState, healthy: bool, spoken_for: Credits) -> Candidate:
    registration = worker.registration
    sequences = state.running_sequences + state.waiting_sequences
    granted = Credits(state.credits.sequences, state.credits.blocks, state.credits.prefill_tokens)
    return Candidate(
        id=worker.id,
        incarnation=registration.incarnation,
        kv_format=registration.kv_format,
        block_size=registration.model.block_size,
        block_bytes=registration.block_bytes,
        max_sequences=registration.max_sequences,
        total_blocks=registration.total_blocks,
        healthy=healthy,
        role=_ROLES.get(state.role or registration.role, "both"),
        credits=granted - spoken_for,
        free_blocks=state.free_blocks - sequences - spoken_for.blocks,
        sequences=sequences + spoken_for.sequences,
        pending_prefill_tokens=state.pending_prefill_tokens + spoken_for.prefill_tokens,
        prefill_tokens_per_s=state.prefill_tokens_per_s or _ASSUMED_TOKENS_PER_S,
        deterministic=registration.deterministic,
    )
