"""`headrace bench-observing`: its options."""

import tempfile
from itertools import count
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from toolkit.bench_observing import BATCH8, ObservingBenchFailed, ObservingOptions, run_observing_bench
from toolkit.bench_observing_report import explain, show_median, show_pair
from toolkit.bench_servers import NotAnswering
from toolkit.bench_stack import StackEnded
from toolkit.command_line import fail, runs
from toolkit.loadtest import LoadFailed
from toolkit.process_tree import NotStopped


def bench_observing(
    pairs: Annotated[int, typer.Option(min=1, help="Times that both stacks are measured; the median is shown.")] = 10,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a measurement.")] = BATCH8.requests,
    up_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- UP_OPTIONS]", help="Options of `headrace up` for both stacks.")
    ] = None,
) -> None:
    """Measures what metrics and traces add to a stack's CPU seconds per token, on two stacks of its own in turns."""
    console, numbers = Console(highlight=False), count(1)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-observing-") as folder:
        options = ObservingOptions(pairs, requests, tuple(up_arguments or []), Path(folder))
        explain(requests, console)
        try:
            done, spans = uvloop.run(
                run_observing_bench(options, runs(), lambda pair: show_pair(next(numbers), pair, console))
            )
        except (LoadFailed, NotAnswering, NotStopped, ObservingBenchFailed, StackEnded) as error:
            fail(str(error))
    show_median(done, spans, console)
