"""The `headrace` command: its subcommands, their options, and how their errors are told."""

import asyncio
import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import aiohttp
import typer
from rich.console import Console

from services.common.config import home_directory
from toolkit.bench import StackEnded, run_rows, show, stack_of_our_own, write
from toolkit.loadtest import ROWS, LoadFailed, Row, RowResult
from toolkit.log_tail import last_lines
from toolkit.models import PullFailed, pull_model
from toolkit.ports import PortTaken, choose_public_port, free_ports
from toolkit.process import ProcessFailed
from toolkit.ps import show_stacks
from toolkit.run_directory import RunDirectory, running_stacks
from toolkit.stack import INTERNAL_HOST, StackOptions, plan_stack
from toolkit.up import run_stack

app = typer.Typer(
    name="headrace",
    help="Serves large language models as a suite of small services.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="Models in the local store.", no_args_is_help=True)
app.add_typer(models_app, name="models")

_SHOWN_LOG_LINES = 20


class Batching(StrEnum):
    CONTINUOUS = "continuous"
    STATIC = "static"


@app.command()
def up(
    model: Annotated[
        str | None, typer.Option(help="Local folder, hub id or store name. Default: a small model that comes along.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes, which share the cores.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="Of weights and KV: float32, bfloat16, float16 or auto.")] = None,
    kv_blocks: Annotated[int | None, typer.Option(min=1, help="KV blocks per worker. Default: by free memory.")] = None,
    max_sequences: Annotated[int | None, typer.Option(min=1, help="Sequences that run together in a worker.")] = None,
    batching: Annotated[
        Batching | None, typer.Option(help="Whether sequences join a running batch (continuous) or wait for its end.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per worker. Default: its share.")] = None,
    host: Annotated[str, typer.Option(help="Interface of the two public ports; 0.0.0.0 opens them to others.")] = (
        "127.0.0.1"
    ),
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="OpenAI-compatible HTTP. 0: a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="Public gRPC. 0: a free one.")] = 50051,
    redis_url: Annotated[
        str | None, typer.Option(help="A Redis of yours, with AOF and without eviction. Default: a private one.")
    ] = None,
) -> None:
    """Starts the whole stack on this machine and keeps it running until Ctrl-C.

    Every other setting of a service can be given as a HEADRACE_SERVICE_SETTING variable.
    """
    console = Console(highlight=False)
    chosen = {"model": model, "dtype": dtype, "kv_blocks": kv_blocks, "max_sequences": max_sequences}
    chosen |= {"batching": batching, "threads": threads}
    try:
        http_port = choose_public_port(host, http_port, "--http-port")
        grpc_port = choose_public_port(host, grpc_port, "--grpc-port", avoid={http_port})
        options = StackOptions(
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            workers=workers,
            redis_url=redis_url,
            worker_settings={setting: value for setting, value in chosen.items() if value is not None},
        )
        stack = plan_stack(
            options, free_ports(INTERNAL_HOST, {http_port, grpc_port}), cores=len(os.sched_getaffinity(0))
        )
        asyncio.run(run_stack(stack, RunDirectory(_runs()), console))
    except PortTaken as error:
        _fail(str(error))
    except ProcessFailed as error:
        log = error.process.spec.log_path
        _fail("\n".join([str(error), *last_lines(log, _SHOWN_LOG_LINES), f"The whole log: {log}"]))


@app.command()
def ps() -> None:
    """Shows the stacks that run on this machine: each process with its health, uptime, memory and load."""
    stacks = running_stacks(_runs())
    if not stacks:
        typer.echo("No stack runs here. Start one with: headrace up")
        return
    asyncio.run(show_stacks(stacks, Console(highlight=False)))


@app.command()
def bench(
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server that runs already. Default: a stack of its own.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Which rows, comma-separated.")] = ",".join(row.name for row in ROWS),
    rounds: Annotated[int, typer.Option(min=1, help="Times that each row is run, each with new prompts.")] = 1,
    out: Annotated[Path, typer.Option(help="Where every round's figures go, as JSON.")] = Path(
        "bench-results/bench.json"
    ),
    up_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- UP_OPTIONS]", help="Options of `headrace up` for the own stack.")
    ] = None,
) -> None:
    """Runs fixed work through a server and prints what its clients saw: tokens per second and latencies."""
    known = {row.name: row for row in ROWS}
    wanted = [name.strip() for name in rows.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        _fail(f"--rows: there is no row {unknown[0]!r}; the rows are {', '.join(known)}.")
    try:
        results = asyncio.run(_bench(url, [known[name] for name in wanted], rounds, up_arguments or []))
    except (LoadFailed, StackEnded) as error:
        _fail(str(error))
    except aiohttp.ClientConnectionError as error:
        _fail(f"--url: {url} does not answer: {error}.")
    show(results, Console(highlight=False))
    write(results, out)
    typer.echo(f"Every round's figures: {out}")


async def _bench(url: str | None, rows: Sequence[Row], rounds: int, up_arguments: Sequence[str]) -> list[RowResult]:
    console = Console(stderr=True, highlight=False)
    if url is not None:
        return await run_rows(url, rows, rounds, console)
    ports = free_ports(INTERNAL_HOST)
    async with stack_of_our_own(next(ports), next(ports), up_arguments) as own_url:
        return await run_rows(own_url, rows, rounds, console)


@models_app.command()
def pull(name: Annotated[str, typer.Argument(help="Local folder, hub id, or `default`.")]) -> None:
    """Fetches a model into the local store, so that a later start finds it there."""
    try:
        path = asyncio.run(pull_model(name, Console(stderr=True, highlight=False)))
    except PullFailed as error:
        _fail(str(error))
    typer.echo(path)


def main() -> None:
    """Entry point of the `headrace` command."""
    app()


def _runs() -> Path:
    return home_directory("state") / "run"


def _fail(message: str) -> NoReturn:
    typer.echo(f"headrace: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    main()
