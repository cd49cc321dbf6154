"""Every process of a loaded stack behind nginx is asked to end, one after the other, and its callers notice nothing."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.callers import Callers
from tests.chaos.cells import AT_ONCE, QUESTIONS, START_TIMEOUT_S, until_healthy
from tests.flows.conftest import WORKER_OPTIONS
from tests.flows.headrace_up import HeadraceUp, eventually
from tests.proxies import Proxy, binary_of, gateways_of

REPLICAS = ("--gateways", "2", "--schedulers", "2", "--workers", "2")
IN_TURN = ("gateway-1", "gateway-2", "scheduler-1", "scheduler-2", "cache", "worker-1", "worker-2")

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(not binary_of("nginx") and not os.environ.get("CI"), reason="there is no nginx here"),
]


@pytest.fixture
def stack(tmp_path: Path, default_model: object) -> Iterator[HeadraceUp]:
    running = HeadraceUp(tmp_path, *REPLICAS, *WORKER_OPTIONS, "--deterministic")
    try:
        yield running
    finally:
        running.kill()


def restart(stack: HeadraceUp, name: str) -> None:
    """SIGTERM; returns when `headrace up` has it ready again."""
    since, pid = stack.lines_so_far, stack.pid_of(name)
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: stack.member(name).pid not in (None, pid), f"{name} runs again", timeout_s=START_TIMEOUT_S)
    stack.wait_for_line(rf"^{name} +ready on", since=since, timeout_s=START_TIMEOUT_S)
    until_healthy(stack, 2)


async def restart_all(stack: HeadraceUp, callers: Callers) -> None:
    running = asyncio.create_task(callers.run())
    for name in IN_TURN:
        await asyncio.to_thread(restart, stack, name)
    callers.stop()
    seen = await running
    assert seen.ends["finished"] == sum(seen.ends.values()) >= len(IN_TURN), (seen.ends, seen.notes)


def test_a_rolling_restart_fails_no_request(stack: HeadraceUp, tmp_path: Path) -> None:
    stack.wait_ready()
    until_healthy(stack, 2)
    nginx = Proxy("nginx", tmp_path, gateways_of(stack))
    try:
        model = stack.fleet().workers[0].registration.model.name
        callers = Callers([nginx.url], model, QUESTIONS[:3], AT_ONCE)
        asyncio.run(callers.learn())
        asyncio.run(restart_all(stack, callers))
    finally:
        nginx.kill()
