import random
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.latency_sketch import RELATIVE_ERROR, LatencySketch, bin_of

SECONDS = st.floats(1e-5, 1e4)
PARTS = (0.0, 0.5, 0.95, 0.99, 1.0)


def sketch_of(seconds: list[float]) -> LatencySketch:
    bins: dict[int, int] = {}
    for one in seconds:
        bins[bin_of(one)] = bins.get(bin_of(one), 0) + 1
    sketch = LatencySketch()
    sketch.add(bins)
    return sketch


def check(sketch: LatencySketch, seconds: list[float]) -> None:
    """Every quantile is near the latency of the nearest rank."""
    ordered = sorted(seconds)
    assert sketch.count == len(ordered)
    assert abs(sketch.mean_s - sum(ordered) / len(ordered)) <= RELATIVE_ERROR / 10 * sum(ordered) / len(ordered)
    for part in PARTS:
        exact = ordered[max(0, ceil(part * len(ordered)) - 1)]
        assert abs(sketch.quantile_s(part) - exact) <= RELATIVE_ERROR * exact


@given(st.lists(SECONDS, min_size=1, max_size=200))
def test_quantiles_are_as_near_as_they_say(seconds: list[float]) -> None:
    check(sketch_of(seconds), seconds)


@pytest.mark.parametrize("count", [1, 2, 10, 1000])
def test_ranks_are_those_of_a_sorted_list(count: int) -> None:
    """Latencies far apart: a neighbor's would be seen."""
    seconds = [1e-5 * 1.03**number for number in range(count - 1)] + [1e9]
    random.Random(count).shuffle(seconds)
    check(sketch_of(seconds), seconds)


def test_the_slower_of_two_is_the_p99() -> None:
    assert sketch_of([0.5, 13.3]).quantile_s(0.99) == pytest.approx(13.3, rel=RELATIVE_ERROR)
    assert sketch_of([0.5, 13.3]).quantile_s(0.5) == pytest.approx(0.5, rel=RELATIVE_ERROR)


@given(st.lists(st.lists(SECONDS, max_size=50), min_size=1, max_size=5).filter(any))
def test_what_is_merged_is_as_near_as_the_whole(parts: list[list[float]]) -> None:
    told = [sketch_of(part).to_proto(whole=True) for part in parts]
    check(LatencySketch.merged(told), [one for part in parts for one in part])


def test_without_any_all_is_zero() -> None:
    told = LatencySketch.merged([LatencySketch().to_proto(whole=True)]).to_proto(whole=False)
    assert (told.count, told.mean, told.p99, told.sketch) == (0, 0.0, 0.0, b"")
    assert sketch_of([0.0]).quantile_s(0.5) < 2e-6
