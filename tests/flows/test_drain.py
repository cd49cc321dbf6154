"""A worker is drained under running streams, which all finish, stays up idle, and comes back into service."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from headrace.v1.scheduler_pb2 import FleetWorker
from tests.flows.conftest import WORKER_OPTIONS
from tests.flows.headrace_up import HeadraceUp, eventually

STREAMS = 6
TOKENS = 160


@pytest.fixture
def two_workers(tmp_path: Path, default_model: Path) -> Iterator[HeadraceUp]:
    """Two workers, two schedulers, and a grace too short for a stream of these."""
    options = (*WORKER_OPTIONS, "--workers", "2", "--schedulers", "2")
    running = HeadraceUp(tmp_path, *options, settings={"HEADRACE_WORKER_DRAIN_GRACE_S": "0.2"})
    try:
        running.wait_ready()
        eventually(lambda: conditions(running) == ["healthy", "healthy"], "the scheduler sees both workers")
        yield running
    finally:
        running.kill()


def workers(stack: HeadraceUp) -> list[FleetWorker]:
    return sorted(stack.fleet().workers, key=lambda worker: worker.registration.worker_id)


def conditions(stack: HeadraceUp) -> list[str]:
    names = (FleetWorker.Condition.Name(worker.condition) for worker in workers(stack))
    return [name.removeprefix("CONDITION_").lower() for name in names]


def sequences(worker: FleetWorker) -> int:
    return worker.state.running_sequences + worker.state.waiting_sequences


def stream(stack: HeadraceUp, number: int, begun: threading.Barrier | None = None, tokens: int = TOKENS) -> int:
    """How many tokens a streamed completion says it has, once it has ended well."""
    model = stack.fleet().workers[0].registration.model.name
    body = {"model": model, "prompt": f"Chapter {number}:", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{stack.http_url}/v1/completions", json=body, timeout=120) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        if begun is not None:
            begun.wait()
        events = [line.removeprefix("data: ") for line in (first, *lines) if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return int(json.loads(events.pop())["usage"]["completion_tokens"])


def test_a_worker_is_drained_under_load_and_comes_back(two_workers: HeadraceUp) -> None:
    stack = two_workers
    drained, other = (worker.registration.worker_id for worker in workers(stack))
    begun = threading.Barrier(STREAMS + 1)
    with ThreadPoolExecutor(STREAMS) as threads:
        streams = [threads.submit(stream, stack, number, begun) for number in range(STREAMS)]
        begun.wait()
        assert all(sequences(worker) for worker in workers(stack))
        assert f"{drained} takes no new work" in stack.run("drain", drained)
        assert [one.result() for one in streams] == [TOKENS] * STREAMS
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
