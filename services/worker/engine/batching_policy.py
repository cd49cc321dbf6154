"""Who may join the running batch, and when. Knows nothing of blocks or token budgets: those are the batcher's."""

from collections.abc import Callable, Collection
from itertools import chain
from typing import Protocol

from services.worker.engine.sequence import Sequence


class BatchingPolicy(Protocol):
    def update(self, waiting: Collection[Sequence], running: Collection[Sequence]) -> None:
        """Called once a step, before the first `admits`; `waiting` is in order of admission."""

    def admits(self, sequence: Sequence) -> bool:
        """Whether this waiting sequence may join in this step, room provided."""


class ContinuousBatching:
    """Sequences join and leave at every step (iteration-level scheduling, Yu et al., "Orca", OSDI 2022)."""

    def update(self, waiting: Collection[Sequence], running: Collection[Sequence]) -> None:
        pass

    def admits(self, sequence: Sequence) -> bool:
        return True


class StaticBatching:
    """A batch starts when `size` sequences wait, or one has waited `timeout_s`; nobody joins until all are done.

    Here for comparison with continuous batching. While it waits for a batch to fill, a step computes nothing.
    """

    def __init__(self, size: int, timeout_s: float, clock: Callable[[], float]) -> None:
        if size < 1:
            raise ValueError(f"a static batch needs at least 1 sequence, got {size}")
        self._size = size
        self._timeout_s = timeout_s
        self._clock = clock
        self._members: set[Sequence] = set()  # of the batch in progress; a preempted one stays a member
        self._outsiders_since: float | None = None

    def update(self, waiting: Collection[Sequence], running: Collection[Sequence]) -> None:
        self._members.intersection_update(chain(waiting, running))
        outsiders = [sequence for sequence in waiting if sequence not in self._members]
        if not outsiders:
            self._outsiders_since = None
            return
        now = self._clock()
        if self._outsiders_since is None:
            self._outsiders_since = now
        overdue = now - self._outsiders_since >= self._timeout_s
        if not self._members and (overdue or len(outsiders) >= self._size):
            self._members.update(outsiders[: self._size])
            self._outsiders_since = None

    def admits(self, sequence: Sequence) -> bool:
        return sequence in self._members
