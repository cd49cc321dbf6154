"""How a stack ends: drained on a signal, at once on a second one, with its parent if that is killed, never in part."""

import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.flows.conftest import WORKER_OPTIONS
from tests.flows.headrace_up import HEADRACE, HeadraceUp, eventually


@pytest.fixture
def own_stack(tmp_path: Path, default_model: Path) -> Iterator[HeadraceUp]:
    """A stack that the test may end."""
    running = HeadraceUp(tmp_path, *WORKER_OPTIONS)
    try:
        running.wait_ready()
        yield running
    finally:
        running.kill()


def completion(stack: HeadraceUp, max_tokens: int) -> dict[str, object]:
    model = stack.fleet().workers[0].registration.model.name
    prompt = {"prompt": "Once upon a time", "max_tokens": max_tokens, "ignore_eos": True}
    return {"model": model, "stream": True, **prompt}


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish(own_stack: HeadraceUp, number: signal.Signals) -> None:
    processes = own_stack.descendants()
    assert len(processes) == 5
    url = f"{own_stack.http_url}/v1/completions"
    with httpx.stream("POST", url, json=completion(own_stack, max_tokens=48), timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        own_stack.process.send_signal(number)
        events = [line for line in (first, *lines) if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert sum('"finish_reason":"length"' in event for event in events) == 1
    assert own_stack.wait_ended() == 0, own_stack.output
    assert running(processes) == []
    assert "was killed" not in own_stack.output
    told = subprocess.run((*HEADRACE, "ps"), env=own_stack.environment, capture_output=True, text=True, check=True)
    assert "No stack runs here" in told.stdout


def test_a_second_signal_ends_it_at_once(own_stack: HeadraceUp) -> None:
    processes = own_stack.descendants()
    url = f"{own_stack.http_url}/v1/completions"
    with httpx.stream("POST", url, json=completion(own_stack, max_tokens=8000), timeout=60) as answer:
        next(answer.iter_lines())
        own_stack.process.send_signal(signal.SIGINT)
        own_stack.wait_for_line(r"^gateway +stopping")
        own_stack.process.send_signal(signal.SIGINT)
        assert own_stack.wait_ended() == 0, own_stack.output
    assert running(processes) == []


def test_nothing_outlives_a_killed_headrace_up(own_stack: HeadraceUp) -> None:
    processes = own_stack.descendants()
    own_stack.kill()
    eventually(lambda: running(processes) == [], "the kernel has ended the children")


def test_a_worker_that_cannot_start_stops_the_stack(tmp_path: Path) -> None:
    up = HeadraceUp(tmp_path, "--model", str(tmp_path / "nothing-here"))
    try:
        assert up.wait_ended() == 1
    finally:
        up.kill()
    assert "worker does not start" in up.output
    assert "nothing-here" in up.output


def test_a_taken_port_is_named_with_its_flag(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        up = HeadraceUp(tmp_path, "--http-port", str(port))
        try:
            assert up.wait_ended() == 1
        finally:
            up.kill()
    assert up.output.startswith(f"headrace: Cannot listen on 127.0.0.1:{port}")
    assert "--http-port" in up.output
