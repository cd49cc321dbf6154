"""`python -m tests.chaos.cancels`: how long after a caller has gone the blocks of its request are free, by phase.

From the closed connection until the scheduler knows that no worker has a sequence and every block is free. A step that
is under way is finished first, so a prompt's chunk bounds it.
"""

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import grpc.aio

from headrace.v1.scheduler_pb2 import DescribeFleetRequest
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from tests.chaos.cells import until_healthy
from tests.flows.headrace_up import HeadraceUp
from toolkit.loadtest import quantile

REPEATS = 20
LONG_TOKENS = 1500
_POLL_S = 0.002
_INTO_PREFILL_S = 0.2


class Leaver:
    """A caller that goes away in the middle of its request."""

    def __init__(self, stack: HeadraceUp) -> None:
        self._url = f"{stack.http_url}/v1/completions"
        self._model = stack.fleet().workers[0].registration.model.name
        self._scheduler = stack.state.scheduler_address
        self._random = random.Random()

    async def leave(self, prompt_tokens: int, *, after_first_token: bool) -> float:
        """Seconds from the close to the last freed block."""
        prompt = [self._random.randrange(300, 30_000) for _ in range(prompt_tokens)]
        body = {"model": self._model, "prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with grpc.aio.insecure_channel(self._scheduler) as channel:
            stub = SchedulerStub(channel)
            session = aiohttp.ClientSession()
            asking = asyncio.create_task(self._ask(session, body))
            await _until_idle(stub, wanted=False)
            if after_first_token:
                await asking
            else:
                await asyncio.sleep(_INTO_PREFILL_S)
                asking.cancel()
            began = time.monotonic()
            await session.close()
            await _until_idle(stub, wanted=True)
            return time.monotonic() - began

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, object]) -> None:
        """Returns with the first event; the answer stays open."""
        reply = await session.post(self._url, json=body)
        await reply.content.readline()


async def _until_idle(stub: SchedulerStub, *, wanted: bool) -> None:
    while await _is_idle(stub) != wanted:  # noqa: ASYNC110 - the scheduler tells nobody
        await asyncio.sleep(_POLL_S)


async def _is_idle(stub: SchedulerStub) -> bool:
    fleet = await stub.DescribeFleet(DescribeFleetRequest())  # type: ignore[misc]
    return all(
        not worker.state.running_sequences
        and not worker.state.waiting_sequences
        and worker.state.free_blocks == worker.registration.total_blocks
        for worker in fleet.workers
    )


async def _show(phase: str, leaver: Leaver, prompt_tokens: int, *, after_first_token: bool) -> None:
    seconds = [await leaver.leave(prompt_tokens, after_first_token=after_first_token) for _ in range(REPEATS)]
    print(f"{phase}: p50 {quantile(seconds, 0.5) * 1e3:.0f} ms, p99 {quantile(seconds, 0.99) * 1e3:.0f} ms", flush=True)


def _run(options: Sequence[str], workers: int, phases: Sequence[tuple[str, int, bool]]) -> None:
    with tempfile.TemporaryDirectory(prefix="headrace-cancels-") as folder:
        stack = HeadraceUp(Path(folder), *options)
        try:
            stack.wait_ready()
            until_healthy(stack, workers)
            leaver = Leaver(stack)
            for phase, tokens, after in phases:
                asyncio.run(_show(phase, leaver, tokens, after_first_token=after))
        finally:
            stack.kill()


def main() -> int:
    _run((), 1, [("decode", 32, True), ("prefill", LONG_TOKENS, False)])
    _run(("--prefill-workers", "1", "--decode-workers", "1"), 2, [("prefill on another worker", LONG_TOKENS, False)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
