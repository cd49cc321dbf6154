"""All connected workers: who they are, and which of them can take work of a model.

A worker is connected while its stream is open, and gets work while it is also heard from, not draining, of the
incarnation that registered last, and its circuit breaker lets it. Knows no connection: the servicer feeds it, listeners
are told.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import get_args

from headrace.v1 import scheduler_pb2
from services.common.errors import InvalidRequest, NotFound
from services.scheduler.attempt_reports import tell
from services.scheduler.breaker import Breaker, BreakerPolicy
from services.scheduler.kv_plans import Candidate, Credits
from services.scheduler.outstanding import PlacementKey
from services.scheduler.worker import Condition, KnownRate, Patience, Worker

log = logging.getLogger(__name__)

_BREAKERS = BreakerPolicy()

Clock = Callable[[], float]


class Fleet:
    """All connected workers."""

    def __init__(
        self,
        *,
        silence_s: float,
        placement_timeout_s: float,
        memory_s: float = 120.0,
        breakers: BreakerPolicy = _BREAKERS,
        clock: Clock = time.monotonic,
    ) -> None:
        """`memory_s`: after its last report, until a worker that has left is not expected back."""
        self._memory_s = memory_s
        self._patience = Patience(silence_s, placement_timeout_s)
        self._breakers = breakers
        self._clock = clock
        self._workers: dict[str, Worker] = {}
        self._left: dict[str, Worker] = {}
        self._rates: defaultdict[str, KnownRate] = defaultdict(KnownRate)  # by model
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
        breaker, rate = Breaker(self._breakers, self._clock), self._rates[registration.model.name]
        worker = Worker(registration, breaker, self._patience, self._clock(), rate)
        old = self._workers.get(worker.id)
        if old is not None and old.incarnation == worker.incarnation:
            worker.take_over(old)
        self._workers[worker.id] = worker
        self._left.pop(worker.id, None)
        log.info("worker %s joined: %s at %s", worker.id, worker.model, registration.address)
        self._on_catalog()
        return worker

    def report(self, worker: Worker, state: scheduler_pb2.WorkerState) -> None:
        """Takes in a worker's state."""
        worker.report(state, self._clock())
        self._on_report(worker.model)

    def leave(self, worker: Worker) -> None:
        """Takes out a worker whose stream has ended, unless a newer stream has replaced it."""
        if self._workers.get(worker.id) is not worker:
            return
        del self._workers[worker.id]
        self._left = {left.id: left for left in (*self._left.values(), worker) if self._may_return(left)}
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
        return sum(other.condition(now) == "healthy" for other in others)

    # --- the gateways' side

    def hear(self, report: scheduler_pb2.AttemptReport) -> None:
        """Takes in what an attempt says of its worker, unless that is another process by now."""
        worker = self._workers.get(report.worker_id)
        if worker is None or worker.incarnation != report.worker_incarnation:
            return
        before = worker.breaker.state
        tell(worker.breaker, report, self._clock())
        if worker.breaker.state != before:
            log.warning("worker %s: breaker %s, and %s before", worker.id, worker.breaker.state, before)
        worker.changed()
        self._on_report(worker.model)

    # --- placement's side

    def candidates(self, model: str) -> list[Candidate]:
        """The model's workers that have reported, with what is left of their credits."""
        now = self._clock()
        return [
            candidate
            for worker in self._workers.values()
            if worker.model == model and (candidate := worker.candidate(now)) is not None
        ]

    def left(self, model: str) -> list[Candidate]:
        """The model's workers that were connected a while ago and may come back."""
        now = self._clock()
        return [
            candidate
            for worker in self._left.values()
            if worker.model == model and self._may_return(worker) and (candidate := worker.candidate(now)) is not None
        ]

    def room(self, model: str, most: int, *, but_on: str = "") -> int:
        """How many more sequences the model's workers, but one of them, could take, as far as `most`."""
        now, room = self._clock(), 0
        for worker in self._workers.values():
            if worker.model == model and worker.id != but_on and (candidate := worker.candidate(now)) is not None:
                room += candidate.room
                if room >= most:
                    return most
        return room

    def reserve(self, worker_id: str, key: PlacementKey, cost: Credits, *, alone: bool = False) -> None:
        """Counts a placement against its worker until the worker reports it, `settle`, or a timeout."""
        self._workers[worker_id].reserve(key, cost, self._clock(), alone=alone)

    def settle(self, worker_id: str, key: PlacementKey) -> None:
        """Ends a placement that will not reach its worker."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.settle(key)
            self._on_report(worker.model)

    def address(self, worker_id: str) -> str:
        return self._workers[worker_id].registration.address

    def suspects(self, worker_id: str) -> bool:
        """Whether the worker has failed lately, so that it matters how its attempts end."""
        return self._workers[worker_id].breaker.suspected

    def reports(self, worker_id: str) -> int | None:
        """How often a worker has reported on its stream; None if it is not connected."""
        worker = self._workers.get(worker_id)
        return None if worker is None else worker.reports

    def serves(self, model: str) -> bool:
        """Whether a connected worker serves the model, be it healthy or not."""
        return any(worker.model == model for worker in self._workers.values())

    # --- everybody's side

    def catalog(self) -> scheduler_pb2.Catalog:
        """The models that connected workers serve, where, and in which KV formats.

        A model's context is the shortest of its workers'.
        """
        entries: dict[str, scheduler_pb2.CatalogEntry] = {}
        for worker in self._workers.values():
            model = worker.registration.model
            entry = entries.setdefault(worker.model, scheduler_pb2.CatalogEntry(model=model))
            shortest = min(entry.model.max_context_tokens, model.max_context_tokens)
            entry.model.max_context_tokens = shortest
            entry.worker_addresses.append(worker.registration.address)
            if worker.registration.kv_format not in entry.kv_formats:
                entry.kv_formats.append(worker.registration.kv_format)
        return scheduler_pb2.Catalog(entries=[entries[name] for name in sorted(entries)])

    def describe(self) -> Iterator[scheduler_pb2.FleetWorker]:
        now = self._clock()
        for worker in self._workers.values():
            condition = worker.condition(now)
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
                counts[worker.condition(now)] += 1
        return counts

    def _may_return(self, left: Worker) -> bool:
        return self._clock() - left.heard_at <= self._memory_s

    def _find(self, worker_id: str) -> Worker:
        worker = self._workers.get(worker_id)
        if worker is None:
            raise NotFound(f"No worker {worker_id} is connected to this scheduler.")
        return worker

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
