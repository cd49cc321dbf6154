"""The run of `headrace bench`: every row on every server in rounds, one server at a time."""

import asyncio
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from toolkit.bench_peers import OURS, Peer, check_answers, peer_server
from toolkit.bench_record import Measurement, Record, gather_facts, write
from toolkit.bench_servers import Server, Turns
from toolkit.bench_stack import stack_of_our_own
from toolkit.cpu_time import CpuMeter
from toolkit.loadtest import MIXED, Row, first_model, lists_models, run_row

CONTINUOUS, STATIC = "continuous", "static"
_GIVEN_SERVER = "--url"


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What the person asked for, checked."""

    # A server that runs already; None: a stack of our own.
    url: str | None
    rows: tuple[Row, ...]
    # Times that each row is run.
    rounds: int
    peers: tuple[Peer, ...]
    # Whether a stack of our own also does the mixed row, under both batching policies.
    compare_batching: bool
    # Options of `headrace up` for the stack of our own.
    up_arguments: tuple[str, ...]
    # The JSON file; the stack's log lies beside it.
    out: Path


@dataclass(frozen=True, slots=True)
class Rounds:
    """The part of a benchmark that all its rounds share."""

    record: Record
    turns: Turns
    progress: Progress
    save: Callable[[], None]

    async def run(self, rows: Sequence[Row], servers: Sequence[Server], into: list[Measurement]) -> None:
        """Runs each row on each server in each round; who goes first changes from round to round."""
        for number in range(self.record.rounds):
            shift = number % len(servers)
            for row in rows:
                for server in (*servers[shift:], *servers[:shift]):
                    into.append(await self._measure(number, row, server))
                    self.save()

    async def _measure(self, number: int, row: Row, server: Server) -> Measurement:
        name = f"round {number + 1} of {self.record.rounds}: {row.name} on {server.name}"
        task = self.progress.add_task(name, total=row.requests)
        await self.turns.give(server)
        model = await first_model(server.url)
        meter = None if server.tree is None else CpuMeter(server.tree.pid)
        seed = self.record.first_seed + number
        result = await run_row(server.url, model, row, seed, partial(self.progress.advance, task), meter)
        self.progress.remove_task(task)
        use = None if meter is None else meter.use
        memory = f", worker RSS {use.worker_rss_mib:,.0f} MiB" if use is not None and use.worker_rss_mib else ""
        self.progress.console.print(f"{name}: {result.rate(row.rate):.1f} {row.rate} tok/s{memory}")
        return Measurement(server.name, number, result, use)


async def run_bench(options: BenchOptions, console: Console) -> Record:
    """The whole benchmark; the JSON file has what was measured so far, at any time.

    Raises LoadFailed, StackEnded, NotAnswering, NotStopped.
    """
    _stop_on_signals()
    # A server that runs on must not know the prompts from the last benchmark.
    seed = secrets.randbits(32)
    rows = (*options.rows, MIXED) if options.compare_batching else options.rows
    record = Record(gather_facts(), options.rounds, seed, rows, options.peers)
    save = partial(write, record, options.out)
    peers = [await peer_server(peer) for peer in options.peers]
    with _open_progress(console) as progress:
        async with _first_server(options, progress) as first:
            with Turns([first, *peers]) as turns:
                rounds = Rounds(record, turns, progress, save)
                await rounds.run(options.rows, [first, *peers], into=record.measurements)
                if options.compare_batching:
                    await rounds.run([MIXED], [replace(first, name=CONTINUOUS)], into=record.batching)
        if options.compare_batching:
            async with _own_stack(STATIC, STATIC, options, progress) as static:
                with Turns([static, *peers]) as turns:
                    await Rounds(record, turns, progress, save).run([MIXED], [static], into=record.batching)
    return record


def _stop_on_signals() -> None:
    """Ends the benchmark in order, as Ctrl-C does, when it is asked to end or its terminal closes.

    Not by way of Ctrl-C's own signal: what a shell runs in the background ignores that one.
    """
    running = asyncio.current_task()
    assert running is not None, "called by a task"
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            asyncio.get_running_loop().add_signal_handler(number, running.cancel)


def _open_progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


@asynccontextmanager
async def _first_server(options: BenchOptions, progress: Progress) -> AsyncIterator[Server]:
    if options.url is None:
        async with _own_stack(OURS, CONTINUOUS, options, progress) as server:
            yield server
    else:
        await check_answers("--url", options.url)
        yield Server(_GIVEN_SERVER, options.url, None, partial(lists_models, options.url))


@asynccontextmanager
async def _own_stack(name: str, batching: str, options: BenchOptions, progress: Progress) -> AsyncIterator[Server]:
    arguments = [*options.up_arguments, *(["--batching", batching] if options.compare_batching else [])]
    log = options.out.with_suffix(".log")
    task = progress.add_task(f"starting the stack, log {log}", total=None)
    async with stack_of_our_own(name, arguments, log) as server:
        progress.remove_task(task)
        yield server
