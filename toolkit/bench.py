"""`headrace bench`: runs the rows of the load test on a stack of its own, or on any server, and prints a table."""

import asyncio
import json
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from toolkit.health import http_ready
from toolkit.loadtest import Row, RowResult, first_model, run_row

_ASK_EVERY_S = 0.2


class StackEnded(Exception):
    """The stack that was started for the benchmark ended before it was ready."""


async def run_rows(url: str, rows: Sequence[Row], rounds: int, console: Console) -> list[RowResult]:
    """Runs each row `rounds` times, each time with a new seed; shows progress. Raises LoadFailed."""
    model = await first_model(url)
    results: list[RowResult] = []
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        first_seed = secrets.randbits(32)  # a server that runs on must not know the prompts from the last benchmark
        for seed in range(first_seed, first_seed + rounds):
            for row in rows:
                task = progress.add_task(row.name, total=row.requests)
                results.append(await run_row(url, model, row, seed, partial(progress.advance, task)))
                progress.remove_task(task)
    return results


@asynccontextmanager
async def stack_of_our_own(http_port: int, grpc_port: int, arguments: Sequence[str]) -> AsyncIterator[str]:
    """Runs `headrace up` with these arguments around the benchmark; gives its URL once it is ready."""
    ports = ("--http-port", str(http_port), "--grpc-port", str(grpc_port))
    process = await asyncio.create_subprocess_exec(sys.executable, "-P", "-m", "toolkit.main", "up", *ports, *arguments)
    url = f"http://127.0.0.1:{http_port}"
    try:
        while not await http_ready(f"{url}/health/ready"):
            if process.returncode is not None:
                raise StackEnded(f"the stack ended with status {process.returncode} before it was ready")
            await asyncio.sleep(_ASK_EVERY_S)
        yield url
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


def show(results: Sequence[RowResult], console: Console) -> None:
    """A line per row: the medians over the rounds."""
    table = Table(title="Medians over the rounds, as the clients saw them", title_justify="left")
    for heading in ("row", "output tok/s", "prompt tok/s", "TTFT p50 ms", "TTFT p99 ms", "inter-token p50 ms", "short"):
        table.add_column(heading, justify="left" if heading == "row" else "right")
    for name in dict.fromkeys(result.row for result in results):
        rounds = [result for result in results if result.row == name]
        middle = [
            f"{median(getattr(result, field) for result in rounds):.1f}"
            for field in (
                "output_tokens_per_s",
                "prompt_tokens_per_s",
                "ttft_p50_ms",
                "ttft_p99_ms",
                "inter_token_p50_ms",
            )
        ]
        table.add_row(name, *middle, str(sum(result.short_answers for result in rounds)))
    console.print(table)


def write(results: Sequence[RowResult], path: Path) -> None:
    """Every round of every row as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
