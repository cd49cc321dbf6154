"""A worker is drained under running streams, which all finish, stays up idle, and comes back into service."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.flows.headrace_up import HeadraceUp, eventually
from tests.flows.two_workers import conditions, running_pair, sequences, stream, workers

STREAMS = 6


@pytest.fixture
def two_workers(tmp_path: Path, default_model: Path) -> Iterator[HeadraceUp]:
    """Two workers, two schedulers, and a grace too short for a stream of these."""
    settings = {"HEADRACE_WORKER_DRAIN_GRACE_S": "0.2"}
    with running_pair(tmp_path, "--schedulers", "2", settings=settings) as running:
        yield running


def test_a_worker_is_drained_under_load_and_comes_back(two_workers: HeadraceUp) -> None:
    stack = two_workers
    drained, other = (worker.registration.worker_id for worker in workers(stack))
    begun = threading.Barrier(STREAMS + 1)
    with ThreadPoolExecutor(STREAMS) as threads:
        streams = [threads.submit(stream, stack, number, begun) for number in range(STREAMS)]
        begun.wait()
        assert all(sequences(worker) for worker in workers(stack))
        assert f"{drained} takes no new work" in stack.run("drain", drained)
        assert [one.result() for one in streams] == [160] * STREAMS
    assert stack.metric("gateway", "headrace_resumes_total", reason="draining") >= 1
    eventually(lambda: conditions(stack) == ["drained", "healthy"], "it is drained")
    assert sequences(workers(stack)[0]) == 0
    assert "drained" in stack.run("ps")

    steps = workers(stack)[0].state.step
    assert stream(stack, 100, tokens=8) == 8
    assert workers(stack)[0].state.step == steps, "the other one has run it"
    assert "requests wait until one does" in stack.run("drain", other)
    eventually(lambda: conditions(stack) == ["drained", "drained"], "nobody is in service")

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(stream, stack, 101, tokens=8)
        assert f"{drained} takes work again" in stack.run("drain", drained, "--undo")
        assert waiting.result() == 8
    eventually(lambda: workers(stack)[0].state.step > steps, "it has run the request")
    assert conditions(stack) == ["healthy", "drained"]
