"""Quantiles of latencies, from counts that cost next to nothing to keep and that any number of processes can merge.

A latency is counted in a bin of 0.14 % first (`bin_of`), a tenth of the work that adding to a sketch is; now and then
the bins go into a DDSketch (Masson, Rim, Lee: "DDSketch", VLDB 2019), whose quantiles are off by a bounded part of the
true value and stay so when sketches are merged.
"""

from collections.abc import Iterable, Mapping
from math import ceil, log2
from typing import Any

from ddsketch import DDSketch
from ddsketch.pb import ddsketch_pb2
from ddsketch.pb.proto import DDSketchProto

from headrace.v1.inference_pb2 import Distribution

RELATIVE_ERROR = 0.01
"""How far a quantile may be off, as a part of the true value: that of the sketch and of the bins together."""

_SKETCH_ERROR = 0.009
_BINS_PER_OCTAVE = 512
_FIRST_BIN = 30 * _BINS_PER_OCTAVE
_NOTHING_S = 1e-6  # what nothing counts as: two tokens that came at the same time


def bin_of(seconds: float) -> int:
    """The bin that a latency is counted in, from 0 on for a nanosecond and more."""
    return int(log2(seconds or _NOTHING_S) * _BINS_PER_OCTAVE + _FIRST_BIN)


class LatencySketch:
    """Latencies in seconds. Nothing of them is kept but some hundred counts."""

    def __init__(self) -> None:
        self._sketch = DDSketch(_SKETCH_ERROR)
        self._sum_s = 0.0

    @property
    def count(self) -> int:
        return int(self._sketch.count)

    @property
    def mean_s(self) -> float:
        """0 without any."""
        return self._sum_s / self._sketch.count if self._sketch.count else 0.0

    def add(self, bins: Mapping[int, int]) -> None:
        """Adds counts of `bin_of`."""
        for number, count in bins.items():
            seconds = 2.0 ** ((number - _FIRST_BIN + 0.5) / _BINS_PER_OCTAVE)
            self._sketch.add(seconds, count)
            self._sum_s += seconds * count

    def merge(self, other: "LatencySketch") -> None:
        self._sketch.merge(other._sketch)
        self._sum_s += other._sum_s

    def quantile_s(self, part: float) -> float:
        """The latency that this part of them, and no less, does not exceed: by nearest rank; 0 without any.

        The sketch itself rounds ranks down, by which the p99 of two latencies were the smaller one.
        """
        rank = max(1, ceil(part * self.count))
        # Half a rank on from where the one that is wanted begins, so that no rounding takes its neighbor.
        quantile = min(1.0, (rank - 0.5) / max(1, self.count - 1))
        return self._sketch.get_quantile_value(quantile) or 0.0

    def to_proto(self, *, whole: bool) -> Distribution:
        """What it says; with `whole` also itself, for `from_proto`."""
        return Distribution(
            count=self.count,
            mean=self.mean_s,
            p50=self.quantile_s(0.5),
            p95=self.quantile_s(0.95),
            p99=self.quantile_s(0.99),
            sketch=_packed(self._sketch) if whole else b"",
        )

    @classmethod
    def merged(cls, distributions: Iterable[Distribution]) -> "LatencySketch":
        """All of several, which carry their sketches. Raises ValueError for one of another accuracy."""
        merged = cls()
        for distribution in distributions:
            one = cls()
            if distribution.sketch:
                one._sketch = _unpacked(distribution.sketch)
            one._sum_s = distribution.mean * distribution.count
            merged.merge(one)
        return merged


def _packed(sketch: Any) -> bytes:
    packed: bytes = DDSketchProto.to_proto(sketch).SerializeToString()  # type: ignore[no-untyped-call]
    return packed


def _unpacked(packed: bytes) -> Any:
    message = ddsketch_pb2.DDSketch()
    message.ParseFromString(packed)
    return DDSketchProto.from_proto(message)  # type: ignore[no-untyped-call]
