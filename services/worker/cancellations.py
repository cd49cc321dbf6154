"""How long it takes from the word that a sequence is wanted no more until its blocks are free, by phase."""

import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Literal, get_args

from prometheus_client import REGISTRY, CollectorRegistry, Histogram

from services.worker.engine_loop import EngineLoop, Turn

Phase = Literal["fetch", "prefill", "decode", "remote_prefill"]
"""Its KV was on its way; its prompt was computed, or waited; it had tokens; it ran for another worker."""

_SECOND_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Cancellations:
    """Cancels in the engine, and watches for the turn by which that is done."""

    def __init__(self, engine: EngineLoop, registry: CollectorRegistry = REGISTRY) -> None:
        self._engine = engine
        self._seconds = Histogram(
            "headrace_cancel_seconds",
            "Time from a cancellation to the freed blocks of its sequence, by phase, s.",
            ["phase"],
            registry=registry,
            buckets=_SECOND_BUCKETS,
        )
        for phase in get_args(Phase):
            self._seconds.labels(phase)  # there from the start, so that the first one is seen as an increase
        self._under_way: deque[tuple[int, float, dict[Phase, int]]] = deque()

    def cancel(self, keys: dict[Hashable, Phase]) -> None:
        """Ends sequences, given by their engine's keys."""
        phases: dict[Phase, int] = {}
        for phase in keys.values():
            phases[phase] = phases.get(phase, 0) + 1
        self._under_way.append((self._engine.cancel(keys), time.monotonic(), phases))

    def watch(self, phase: Phase) -> Callable[[object], None]:
        """To be called when what was cancelled just now has ended, if that is no sequence of the engine's."""
        began = time.monotonic()
        return lambda _: self._seconds.labels(phase).observe(time.monotonic() - began)

    def observe(self, turn: Turn) -> None:
        """Called on the event loop after each turn of the engine."""
        while self._under_way and self._under_way[0][0] <= turn.status.commands:
            _, began, phases = self._under_way.popleft()
            for phase, count in phases.items():
                for _ in range(count):
                    self._seconds.labels(phase).observe(time.monotonic() - began)
