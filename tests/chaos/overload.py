"""`python -m tests.chaos.overload`: for a minute, ten times the requests that a stack can serve, and what comes of it.

First as many callers as a worker runs together ask without a pause: that is the best it does. Then requests come at ten
times that rate, whether or not earlier ones have been answered.
"""

import asyncio
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from tests.chaos.cells import until_healthy
from tests.flows.headrace_up import HeadraceUp
from toolkit.loadtest import quantile

TIMES = 10
AT_ONCE = 32
PROMPT_TOKENS, TOKENS = 32, 32
_BEST_S, _OVERLOAD_S, _SETTLE_S = 30.0, 60.0, 10.0


@dataclass(slots=True)
class Tally:
    """What came of the requests."""

    finished: int = 0
    refused: int = 0
    failed: int = 0
    first_token_s: list[float] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    retry_after_s: list[int] = field(default_factory=list)

    def tokens_per_s(self, began: float, seconds: float) -> float:
        """Of the time after things have settled."""
        times = [at for at in self.token_times if began + _SETTLE_S <= at <= began + seconds]
        return len(times) / (seconds - _SETTLE_S)


class Load:
    """Requests of random prompts to one gateway."""

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._model = model
        self._random = random.Random()

    async def best(self, tally: Tally) -> None:
        """Callers that ask one after the other."""
        async with self._session() as session:
            end = time.monotonic() + _BEST_S

            async def call() -> None:
                while time.monotonic() < end:
                    await self._ask(session, tally)

            await asyncio.gather(*(call() for _ in range(AT_ONCE)))

    async def overload(self, tally: Tally, rate: float) -> None:
        """Requests that come at random, so many a second; returns when all have ended."""
        async with self._session() as session, asyncio.TaskGroup() as tasks:
            end = time.monotonic() + _OVERLOAD_S
            while time.monotonic() < end:
                tasks.create_task(self._ask(session, tally))
                await asyncio.sleep(self._random.expovariate(rate))

    async def _ask(self, session: aiohttp.ClientSession, tally: Tally) -> None:
        prompt = [self._random.randrange(300, 30_000) for _ in range(PROMPT_TOKENS)]
        body = {"model": self._model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        began, first = time.monotonic(), True
        async with session.post(f"{self._url}/v1/completions", json={**body, "stream": True}) as reply:
            if reply.status in (429, 503):
                tally.refused += 1
                tally.retry_after_s.append(int(reply.headers["Retry-After"]))
                return
            done = False
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    now = time.monotonic()
                    if first:
                        tally.first_token_s.append(now - began)
                        first = False
                    tally.token_times.append(now)
                done = done or line.startswith(b"data: [DONE]")
        if done:
            tally.finished += 1
        else:
            tally.failed += 1

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0))


async def watch_memory(processes: list[psutil.Process], most: list[float]) -> None:
    while True:
        most[0] = max(most[0], sum(process.memory_info().rss for process in processes) / 2**20)
        await asyncio.sleep(0.5)


async def measure(stack: HeadraceUp) -> bool:
    """Prints the figures; whether they are as promised."""
    load = Load(stack.http_url, stack.fleet().workers[0].registration.model.name)
    best, tally, most = Tally(), Tally(), [0.0]
    began = time.monotonic()
    await load.best(best)
    best_rate = best.tokens_per_s(began, _BEST_S)
    processes = [psutil.Process(stack.pid_of(name)) for name in ("gateway", "scheduler", "redis")]
    before = sum(process.memory_info().rss for process in processes) / 2**20
    watching = asyncio.create_task(watch_memory(processes, most))
    began = time.monotonic()
    await load.overload(tally, TIMES * best_rate / TOKENS)
    watching.cancel()
    goodput = tally.tokens_per_s(began, _OVERLOAD_S)
    print(f"best: {best_rate:.1f} tokens/s with {AT_ONCE} callers")
    print(f"{TIMES}x: {goodput:.1f} tokens/s, {goodput / best_rate:.2f}x of the best")
    print(f"accepted {tally.finished + tally.failed}, finished {tally.finished}, refused {tally.refused}")
    p50, p99 = (quantile(tally.first_token_s, share) for share in (0.5, 0.99))
    print(f"first token p50 {p50:.1f} s, p99 {p99:.1f} s")
    print(f"told to come again in {min(tally.retry_after_s)} to {max(tally.retry_after_s)} s")
    print(f"gateway, scheduler and Redis: {before:.0f} MiB before, {most[0]:.0f} MiB at most")
    return not tally.failed and goodput >= 0.9 * best_rate


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="headrace-overload-") as folder:
        stack = HeadraceUp(Path(folder), *sys.argv[1:])
        try:
            stack.wait_ready()
            until_healthy(stack, 1)
            return int(not asyncio.run(measure(stack)))
        finally:
            stack.kill()


if __name__ == "__main__":
    sys.exit(main())
