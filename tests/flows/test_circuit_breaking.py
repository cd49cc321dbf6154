"""A worker that stalls under running streams is cut off, and gets work again once a probe has gone well."""

import os
import signal
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
    """Two workers, and a gateway that soon calls one stalled."""
    with running_pair(tmp_path, settings={"HEADRACE_GATEWAY_WORKER_SILENCE_S": "2"}) as running:
        yield running


def test_a_stalled_worker_is_cut_off_and_probed(two_workers: HeadraceUp) -> None:
    stack = two_workers
    stalled = stack.pid_of(workers(stack)[0].registration.worker_id)
    begun = threading.Barrier(STREAMS + 1)
    with ThreadPoolExecutor(STREAMS) as threads:
        streams = [threads.submit(stream, stack, number, begun) for number in range(STREAMS)]
        begun.wait()
        assert all(sequences(worker) for worker in workers(stack))
        os.kill(stalled, signal.SIGSTOP)
        try:
            assert [one.result() for one in streams] == [160] * STREAMS
        finally:
            os.kill(stalled, signal.SIGCONT)
    assert stack.metric("gateway", "headrace_resumes_total", reason="stalled") >= 1
    eventually(lambda: conditions(stack) == ["breaker_half_open", "healthy"], "its backoff has ended")
    assert "breaker half open" in stack.run("ps")

    def healthy_after_a_request() -> bool:
        assert stream(stack, 100, tokens=4) == 4
        return conditions(stack) == ["healthy", "healthy"]

    eventually(healthy_after_a_request, "a probe has gone well")
