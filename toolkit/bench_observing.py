"""`headrace bench-observing`: what metrics and traces add to a stack's CPU time.

Two stacks of its own do the same work in turns: one with metrics, which are scraped as Prometheus does, and with traces
of a tenth of its requests; one with neither. The one that is not measured stands still. Each pair has stacks of its
own: of two that are alike, one spends up to 4 % more for as long as it runs.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp

from services.common.channel import cancel_and_wait
from toolkit.bench_servers import Server, Turns
from toolkit.bench_stack import HEADRACE_UP, stack_of_our_own
from toolkit.cpu_time import CpuMeter
from toolkit.loadtest import ROWS, Row, first_model, run_row
from toolkit.run_directory import running_stacks
from toolkit.span_sink import span_sink

BATCH8 = next(row for row in ROWS if row.name == "batch8")
TRACE_SAMPLE = 0.1
SCRAPE_EVERY_S = 5.0  # as deploy/compose/prometheus/prometheus.yml has it

_SPANS_EVERY_MS = 1000
# Both stacks are measured for so long after their last answer: until then its spans have been sent.
_LAST_SPANS_S = 1.5
_ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


class ObservingBenchFailed(Exception):
    """One sentence for the person."""


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds per 1,000 output tokens: of the workers, and of all other processes of a stack."""

    workers_s: float
    others_s: float

    @property
    def all_s(self) -> float:
        return self.workers_s + self.others_s


@dataclass(frozen=True, slots=True)
class Pair:
    """The same work on both stacks, one right after the other."""

    observed: Spent
    plain: Spent

    def ratio(self, of: Callable[[Spent], float]) -> float:
        """With observing, of without."""
        return of(self.observed) / of(self.plain)


@dataclass(frozen=True, slots=True)
class ObservingOptions:
    """What the person asked for."""

    pairs: int
    # Of each measurement.
    requests: int
    up_arguments: tuple[str, ...]
    # For the stacks' logs.
    folder: Path


@dataclass(frozen=True, slots=True)
class _Subject:
    server: Server
    # Where its metrics are read.
    scraped: tuple[str, ...] = ()


async def run_observing_bench(
    options: ObservingOptions, runs: Path, on_pair: Callable[[Pair], None]
) -> tuple[list[Pair], int]:
    """All pairs, and how many spans came; tells each pair as it is done. Who goes first changes from pair to pair.

    Raises StackEnded, LoadFailed, NotAnswering, NotStopped, ObservingBenchFailed.
    """
    pairs = []
    async with span_sink() as sink:
        for number in range(options.pairs):
            async with _observed(options, sink.endpoint, runs) as observed, _plain(options) as plain:
                pairs.append(await _pair(number, options, observed, plain))
                on_pair(pairs[-1])
        return pairs, await sink.end()


async def _pair(number: int, options: ObservingOptions, observed: _Subject, plain: _Subject) -> Pair:
    row = replace(BATCH8, requests=options.requests)
    order = (observed, plain) if number % 2 else (plain, observed)
    with Turns([observed.server, plain.server]) as turns:
        for subject in order:  # what a first time costs is no part of the pair
            await _measure(subject, turns, replace(row, requests=row.concurrency), seed=0)
        spent = {subject: await _measure(subject, turns, row, seed=1 + number) for subject in order}
    return Pair(spent[observed], spent[plain])


@asynccontextmanager
async def _observed(options: ObservingOptions, endpoint: str, runs: Path) -> AsyncIterator[_Subject]:
    settings = (
        "HEADRACE_METRICS=true",
        f"HEADRACE_OTLP_ENDPOINT={endpoint}",
        f"HEADRACE_TRACE_SAMPLE={TRACE_SAMPLE:g}",
        f"OTEL_BSP_SCHEDULE_DELAY={_SPANS_EVERY_MS}",
    )
    async with _stack("observed", options, settings) as server:
        stack = next(stack for stack in running_stacks(runs) if stack.http_url == server.url)
        urls = (process.metrics_url for process in stack.processes)
        yield _Subject(server, tuple(url for url in urls if url is not None))


@asynccontextmanager
async def _plain(options: ObservingOptions) -> AsyncIterator[_Subject]:
    async with _stack("plain", options, ("HEADRACE_METRICS=false", "HEADRACE_OTLP_ENDPOINT=")) as server:
        yield _Subject(server)


def _stack(name: str, options: ObservingOptions, settings: Sequence[str]) -> AbstractAsyncContextManager[Server]:
    # On a machine that others keep busy nobody is to be turned away because of the wait.
    command = ("env", *settings, "HEADRACE_GATEWAY_MAX_WAIT_S=3600", *HEADRACE_UP)
    return stack_of_our_own(name, options.up_arguments, options.folder / f"{name}.log", command)


async def _measure(subject: _Subject, turns: Turns, row: Row, seed: int) -> Spent:
    server = subject.server
    await turns.give(server)
    model = await first_model(server.url)
    assert server.tree is not None, "a stack of our own"
    with CpuMeter(server.tree.pid) as meter:
        async with _scraping(subject.scraped):
            result = await run_row(server.url, model, row, seed)
            await asyncio.sleep(_LAST_SPANS_S)
    assert meter.use is not None, "it has ended"
    thousands = result.output_tokens_per_s * result.wall_s / 1000
    return Spent(meter.use.worker_s / thousands, meter.use.other_s / thousands)


@asynccontextmanager
async def _scraping(urls: Sequence[str]) -> AsyncIterator[None]:
    """Reads all metrics at once and then again and again, as Prometheus does."""
    task = asyncio.create_task(_scrape(urls), name="scrape")
    try:
        yield
        if task.done():
            raise ObservingBenchFailed(f"metrics could not be read: {task.exception()}")
    finally:
        await cancel_and_wait([task])


async def _scrape(urls: Sequence[str]) -> None:
    async with aiohttp.ClientSession(headers={"accept": _ACCEPT}, raise_for_status=True) as session:
        while True:
            for url in urls:
                async with session.get(url) as reply:
                    await reply.read()
            await asyncio.sleep(SCRAPE_EVERY_S)
