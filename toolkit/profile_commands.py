"""`headrace profile`: its options, and how its results and errors are told."""

import asyncio
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.v1.profile_pb2 import ProfileRequest
from toolkit.command_line import fail, runs
from toolkit.directives import NotTold
from toolkit.profile import profile_worker, record_service, show_report
from toolkit.run_directory import running_stacks


class Format(StrEnum):
    FLAMEGRAPH = "flamegraph"
    SPEEDSCOPE = "speedscope"


def profile(
    worker: Annotated[str | None, typer.Option(help="Id of a worker whose engine is profiled.")] = None,
    service: Annotated[
        str | None, typer.Option(help="Any service, or its id, whose Python code is recorded from outside by py-spy.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=100_000, help="Of a worker: steps that are timed.")] = 50,
    traced_steps: Annotated[
        int, typer.Option(min=0, max=1000, help="Of a worker: steps after those that are traced; 0: no trace.")
    ] = 10,
    timeout: Annotated[
        int, typer.Option(min=1, max=600, help="Of a worker: seconds in which the steps must come.")
    ] = 60,
    seconds: Annotated[int, typer.Option(min=1, help="Of a service: how long it is recorded.")] = 10,
    format: Annotated[Format, typer.Option(help="Of a service: the file's format.")] = Format.FLAMEGRAPH,
    out: Annotated[Path | None, typer.Option(help="Folder for the files. Default: profiles/DATE.")] = None,
) -> None:
    """Shows what a running worker's steps take, with a trace of some; or records any service as a flame graph.

    trace.json.gz opens in Perfetto or chrome://tracing, the folder tensorboard/ in TensorBoard's profiler.
    """
    if (worker is None) == (service is None):
        raise typer.BadParameter("give either --worker or --service.")
    folder = out or Path("profiles") / time.strftime("%Y%m%d-%H%M%S")
    stacks = running_stacks(runs())
    try:
        if worker is not None:
            request = ProfileRequest(steps=steps, traced_steps=traced_steps, timeout_ms=timeout * 1000)
            show_report(asyncio.run(profile_worker(stacks, worker, request, folder)), Console(highlight=False))
            typer.echo(f"Report and trace: {folder}")
        elif service is not None:
            typer.echo(record_service(stacks, service, seconds, format.value, folder))
    except NotTold as error:
        fail(str(error))
