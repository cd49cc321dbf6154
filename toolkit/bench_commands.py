"""`headrace bench` and its kin: their options, and what they print."""

import asyncio
import tempfile
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from toolkit.bench import BenchOptions, run_bench
from toolkit.bench_chats import run_chats_bench
from toolkit.bench_gateway import (
    GatewayBenchFailed,
    GatewayBenchOptions,
    parse_control_planes,
    run_cost_bench,
    run_memory_bench,
    run_slow_bench,
)
from toolkit.bench_gateway_report import show_cost, show_memory, show_slow
from toolkit.bench_kv import KvBenchFailed, KvBenchOptions, run_kv_bench
from toolkit.bench_kv_report import show_chats, show_kv, show_split
from toolkit.bench_peers import BadPeer, is_base_url, parse_peers
from toolkit.bench_plot import plot
from toolkit.bench_report import invalid_figures, show
from toolkit.bench_servers import NotAnswering
from toolkit.bench_split import run_split_bench
from toolkit.bench_stack import StackEnded
from toolkit.command_line import fail, runs
from toolkit.loadtest import ROWS, TEXT, LoadFailed, Row
from toolkit.process_tree import NotStopped

_ALL_ROWS = ",".join(row.name for row in ROWS)


class KvPart(StrEnum):
    WAYS = "ways"
    SPLIT = "split"
    CHATS = "chats"


class GatewayPart(StrEnum):
    COST = "cost"
    SLOW = "slow"
    MEMORY = "memory"


def bench(
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server that runs already. Default: a stack of its own.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=URL[,PID]",
            help="Another OpenAI-compatible server to compare with; may be repeated. With PID, that process and its "
            "children are stopped while another server is measured.",
        ),
    ] = None,
    rows: Annotated[str, typer.Option(help="Which rows, comma-separated; there is `text`, too.")] = _ALL_ROWS,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each row is run, each with new prompts.")] = 1,
    static: Annotated[
        bool | None,
        typer.Option(
            help="Also do mixed lengths with continuous and with static batching, on a stack of its own each. "
            "Default: when every row is run on a stack of its own.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file; a picture (.png) and a log go beside it. Default: bench-results/DATE.json."),
    ] = None,
    up_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- UP_OPTIONS]", help="Options of `headrace up` for the own stack.")
    ] = None,
) -> None:
    """Runs fixed work through servers, one at a time, and prints what their clients saw: rates and latencies.

    The stack of its own takes the options of `headrace up` after `--`, and every HEADRACE_SERVICE_SETTING variable,
    as in: HEADRACE_WORKER_DTYPE=bfloat16 headrace bench --rows single -- --threads 2
    """
    try:
        options = BenchOptions(
            url=url,
            rows=_chosen_rows(rows),
            rounds=rounds,
            peers=parse_peers(peer or []),
            compare_batching=_compares_batching(static, url, rows, up_arguments or []),
            up_arguments=tuple(up_arguments or []),
            out=out or Path("bench-results") / f"{time.strftime('%Y%m%d-%H%M%S')}.json",
        )
        if url is not None and not is_base_url(url.rstrip("/")):
            fail(f"--url: {url!r} is not a URL without a path, such as http://127.0.0.1:8000.")
        record = asyncio.run(run_bench(options, Console(stderr=True, highlight=False)))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None  # asked to end
    except (BadPeer, LoadFailed, NotAnswering, NotStopped, StackEnded) as error:
        fail(str(error))
    show(record, Console(highlight=False))
    plot(record, options.out.with_suffix(".png"))
    typer.echo(f"Every round's figures: {options.out}    picture: {options.out.with_suffix('.png')}")
    if invalid := invalid_figures(record):
        fail("\n".join(invalid))


def bench_kv(
    prompt_tokens: Annotated[int, typer.Option(min=64, help="Length of each prompt.")] = 1536,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts per row; medians are shown.")] = 5,
    part: Annotated[
        list[KvPart] | None,
        typer.Option(help="Ways to a prompt's KV, decodes beside prompts (split), or chats. May be given twice."),
    ] = None,
    up_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- UP_OPTIONS]", help="Options of `headrace up` for the stacks.")
    ] = None,
) -> None:
    """Measures what KV from other processes of a stack is good for."""
    chosen = part or list(KvPart)
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-kv-") as folder:
        options = KvBenchOptions(prompt_tokens, repeats, tuple(up_arguments or []), Path(folder))
        try:
            if KvPart.WAYS in chosen:
                show_kv(uvloop.run(run_kv_bench(options, runs())), console)
            if KvPart.SPLIT in chosen:
                show_split(uvloop.run(run_split_bench(prompt_tokens, options.up_arguments, options.folder)), console)
            if KvPart.CHATS in chosen:
                show_chats(uvloop.run(run_chats_bench(options.up_arguments, options.folder, runs())), console)
        except (KvBenchFailed, LoadFailed, StackEnded) as error:
            fail(str(error))


def bench_gateway(
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=URL,PID[,PID...]",
            help="Another OpenAI-compatible server with a model of its own pace, and the processes, with their "
            "children, whose CPU is counted; may be repeated.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each load is run; medians are shown.")] = 3,
    seconds: Annotated[float, typer.Option(min=1.0, help="Seconds that each load is measured.")] = 8.0,
    part: Annotated[
        list[GatewayPart] | None,
        typer.Option(help="CPU and TTFT (cost), slow clients (slow), memory. Default: cost and slow."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of the part `memory`.")] = 100_000,
    up_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- UP_OPTIONS]", help="Options of `headrace up` for the stacks.")
    ] = None,
) -> None:
    """Measures what everything but the model costs, with a worker that answers without one (`--engine echo`)."""
    chosen = part or [GatewayPart.COST, GatewayPart.SLOW]
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-gateway-") as folder:
        try:
            options = GatewayBenchOptions(
                rounds, seconds, parse_control_planes(peer or []), tuple(up_arguments or []), Path(folder) / "stack.log"
            )
            if GatewayPart.COST in chosen:
                show_cost(uvloop.run(run_cost_bench(options, runs())), console)
            if GatewayPart.SLOW in chosen:
                show_slow(uvloop.run(run_slow_bench(options, runs())), console)
            if GatewayPart.MEMORY in chosen:
                show_memory(uvloop.run(run_memory_bench(options, runs(), requests)), console)
        except (BadPeer, GatewayBenchFailed, NotAnswering, StackEnded) as error:
            fail(str(error))


def _chosen_rows(names: str) -> tuple[Row, ...]:
    known = {row.name: row for row in (*ROWS, TEXT)}
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        fail(f"--rows: there is no row {unknown[0]!r}; the rows are {', '.join(known)}.")
    return tuple(known[name] for name in dict.fromkeys(wanted))


def _compares_batching(asked: bool | None, url: str | None, rows: str, up_arguments: list[str]) -> bool:
    """Whether the batching policies are compared, which fits only a stack that starts with each of them in turn."""
    chosen = any(argument.split("=")[0] == "--batching" for argument in up_arguments)
    if asked is None:
        return url is None and not chosen and rows == _ALL_ROWS
    if asked and (url is not None or chosen):
        fail(f"--static starts stacks with either batching policy: leave out {'--batching' if chosen else '--url'}.")
    return asked
