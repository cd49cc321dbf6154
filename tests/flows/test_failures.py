"""Processes of a stack with two workers are killed under it, one after the other, and the stack goes on."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.flows.conftest import WORKER_OPTIONS
from tests.flows.headrace_up import HeadraceUp, eventually


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[HeadraceUp]:
    running = HeadraceUp(tmp_path_factory.mktemp("two-workers"), *WORKER_OPTIONS, "--workers", "2")
    try:
        running.wait_ready()
        eventually(lambda: healthy_workers(running) == 2, "the scheduler sees both workers")
        yield running
    finally:
        running.kill()


def healthy_workers(stack: HeadraceUp) -> int:
    return sum(worker.healthy for worker in stack.fleet().workers)


def ask(stack: HeadraceUp, max_tokens: int = 24, prompt: str = "Once upon a time") -> str:
    """The text of a greedy completion."""
    model = stack.fleet().workers[0].registration.model.name
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    answer = httpx.post(f"{stack.http_url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def busy_worker(stack: HeadraceUp) -> str:
    """The worker that runs the one request there is."""
    busy: list[str] = []

    def one_is_busy() -> bool:
        workers = stack.fleet().workers
        busy[:] = [worker.registration.worker_id for worker in workers if worker.state.running_sequences]
        return len(busy) == 1

    eventually(one_is_busy, "one worker is busy")
    return busy[0]


def streamed_text(lines: list[str]) -> str:
    """The joined text of server-sent events of a completion; checks that they end well."""
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def steps(stack: HeadraceUp) -> dict[str, int]:
    """Engine steps of each worker."""
    return {worker.registration.worker_id: worker.state.step for worker in stack.fleet().workers}


def test_two_workers_share_the_load(two_workers: HeadraceUp) -> None:
    before = steps(two_workers)
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda number: ask(two_workers, prompt=f"Chapter {number}:"), range(8)))
    assert len(texts) == 8
    eventually(lambda: all(now > before[name] for name, now in steps(two_workers).items()), "both workers took steps")


def test_a_worker_killed_mid_stream_is_a_pause(two_workers: HeadraceUp) -> None:
    whole = ask(two_workers, max_tokens=200)
    model = two_workers.fleet().workers[0].registration.model.name
    body = {"model": model, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 200, "ignore_eos": True}
    lines: list[str] = []
    with httpx.stream(
        "POST", f"{two_workers.http_url}/v1/completions", json={**body, "stream": True}, timeout=120
    ) as answer:
        stream = answer.iter_lines()
        lines.append(next(stream))
        two_workers.kill_member(busy_worker(two_workers))
        lines += stream
    assert streamed_text(lines) == whole


def test_a_killed_scheduler_is_a_pause(two_workers: HeadraceUp) -> None:
    text = ask(two_workers)
    two_workers.kill_member("scheduler")
    eventually(lambda: healthy_workers(two_workers) == 2, "both workers are back at the scheduler")
    assert ask(two_workers) == text


@pytest.mark.parametrize("name", ["cache", "redis", "gateway"])
def test_the_stack_answers_after_a_kill(two_workers: HeadraceUp, name: str) -> None:
    text = ask(two_workers)
    two_workers.kill_member(name)
    assert ask(two_workers) == text
