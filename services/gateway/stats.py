"""How requests went lately: counts, rates and latencies per model, over windows that slide.

What is counted falls into slices of 10 seconds. A window is the slice under way and so many before it; six slices that
have ended make a minute, of which an hour is made. Counting costs a request nothing but additions; slices are
turned into sketches as they end, and merged when somebody asks.
"""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from headrace.v1.inference_pb2 import InferenceMetrics, WindowMetrics
from services.common.latency_sketch import RELATIVE_ERROR, LatencySketch, bin_of

Exemplar = dict[str, str] | None
"""Labels that name the trace of what was observed."""

_SLICE_S = 10.0
_SLICES_A_MINUTE = 6
_MINUTES = 60


class Bins:
    """Latencies, counted."""

    def __init__(self) -> None:
        self._bins: defaultdict[int, int] = defaultdict(int)

    def take(self) -> LatencySketch:
        """What was observed since the last call."""
        bins, self._bins = self._bins, defaultdict(int)
        sketch = LatencySketch()
        sketch.add(bins)
        return sketch


class Observed(Bins):
    """A histogram of latencies whose observations are counted here, too."""

    def __init__(self, observe: Callable[[float, Exemplar], None]) -> None:
        super().__init__()
        self._observe = observe

    def observe(self, seconds: float, exemplar: Exemplar = None) -> None:
        self._observe(seconds, exemplar)
        self._bins[bin_of(seconds)] += 1


class ObservedOften(Bins):
    """The same of a histogram that takes many equal latencies at once."""

    def __init__(self, observe: Callable[[float, int], None]) -> None:
        super().__init__()
        self._observe = observe

    def observe(self, seconds: float, count: int) -> None:
        self._observe(seconds, count)
        self._bins[bin_of(seconds)] += count


class Counted:
    """A counter whose additions are counted here, too."""

    def __init__(self, inc: Callable[[float], None]) -> None:
        self._inc = inc
        self._count = 0

    def inc(self, amount: int = 1) -> None:
        self._inc(amount)
        self._count += amount

    def take(self) -> int:
        count, self._count = self._count, 0
        return count


@dataclass(frozen=True, slots=True)
class Recorders:
    """Where one model's requests are counted."""

    succeeded: Counted
    failed: Counted
    tokens: Counted
    time_to_first_token: Observed
    inter_token_latency: ObservedOften
    end_to_end: Observed


@dataclass(slots=True)
class Slice:
    """What was counted in some time."""

    seconds: float = 0.0
    requests: int = 0
    failed: int = 0
    tokens: int = 0
    time_to_first_token: LatencySketch = field(default_factory=LatencySketch)
    inter_token_latency: LatencySketch = field(default_factory=LatencySketch)
    end_to_end: LatencySketch = field(default_factory=LatencySketch)

    @classmethod
    def taken(cls, recorders: Recorders, seconds: float) -> "Slice":
        return cls(
            seconds,
            recorders.succeeded.take(),
            recorders.failed.take(),
            recorders.tokens.take(),
            recorders.time_to_first_token.take(),
            recorders.inter_token_latency.take(),
            recorders.end_to_end.take(),
        )

    def merge(self, other: "Slice") -> None:
        self.seconds += other.seconds
        self.requests += other.requests
        self.failed += other.failed
        self.tokens += other.tokens
        self.time_to_first_token.merge(other.time_to_first_token)
        self.inter_token_latency.merge(other.inter_token_latency)
        self.end_to_end.merge(other.end_to_end)

    def to_proto(self, model: str, window: str, *, sketches: bool) -> WindowMetrics:
        return WindowMetrics(
            model=model,
            window=window,
            seconds=self.seconds,
            requests=self.requests,
            failed=self.failed,
            tokens=self.tokens,
            tokens_per_s=self.tokens / self.seconds if self.seconds else 0.0,
            time_to_first_token_s=self.time_to_first_token.to_proto(whole=sketches),
            inter_token_latency_s=self.inter_token_latency.to_proto(whole=sketches),
            end_to_end_s=self.end_to_end.to_proto(whole=sketches),
        )


class Windows:
    """The slices of one model."""

    def __init__(self, recorders: Recorders, started: float) -> None:
        self._recorders = recorders
        self._looked_at = started
        self._under_way = Slice()
        self._slices: deque[Slice] = deque(maxlen=5 * _SLICES_A_MINUTE)
        self._minutes: deque[Slice] = deque(maxlen=_MINUTES)
        self._minute = Slice()
        self._slices_of_minute = 0
        self._all = Slice()

    def look(self, now: float) -> None:
        """Takes over what was counted since the last look."""
        self._under_way.merge(Slice.taken(self._recorders, now - self._looked_at))
        self._looked_at = now

    def turn(self) -> None:
        """The slice under way has ended."""
        ended, self._under_way = self._under_way, Slice()
        self._slices.append(ended)
        self._all.merge(ended)
        self._minute.merge(ended)
        self._slices_of_minute += 1
        if self._slices_of_minute == _SLICES_A_MINUTE:
            self._minutes.append(self._minute)
            self._minute, self._slices_of_minute = Slice(), 0

    def sums(self) -> dict[str, Slice]:
        """Of each window, as of the last look."""
        slices = list(self._slices)
        return {
            "1m": self._sum(slices[-_SLICES_A_MINUTE:]),
            "5m": self._sum(slices),
            "1h": self._sum([*self._minutes, self._minute]),
            "all": self._sum([self._all]),
        }

    def _sum(self, ended: Iterable[Slice]) -> Slice:
        whole = Slice()
        for one in (*ended, self._under_way):
            whole.merge(one)
        return whole


class InferenceStats:
    """All models of a gateway. `run` turns the slices."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: dict[str, Windows] = {}

    def follow(self, model: str, recorders: Recorders) -> None:
        """Counts a model from now on."""
        self._windows[model] = Windows(recorders, self._clock())

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(_SLICE_S)
            self.turn()

    def turn(self) -> None:
        """Ends the slice under way."""
        for windows in self._windows.values():
            windows.look(self._clock())
            windows.turn()

    def report(self, *, sketches: bool = False) -> InferenceMetrics:
        """Every model and window; `sketches`: with what merging needs."""
        report = InferenceMetrics(relative_error=RELATIVE_ERROR)
        for model, windows in sorted(self._windows.items()):
            windows.look(self._clock())
            report.windows.extend(one.to_proto(model, name, sketches=sketches) for name, one in windows.sums().items())
        return report
