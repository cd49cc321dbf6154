"""Prints what `headrace bench-observing` measured."""

from collections.abc import Sequence
from statistics import median

from rich.console import Console

from toolkit.bench_observing import BATCH8, SCRAPE_EVERY_S, TRACE_SAMPLE, Pair


def explain(requests: int, console: Console) -> None:
    """What the lines that follow mean."""
    console.print(
        f"CPU seconds of a whole stack per 1,000 output tokens; {requests} requests of {BATCH8.unique_prompt} + "
        f"{BATCH8.output} tokens, {BATCH8.concurrency} at a time; with metrics, read every {SCRAPE_EVERY_S:g} s, and "
        f"traces of {TRACE_SAMPLE:.0%} of the requests, and without both.",
        soft_wrap=True,
    )


def show_pair(number: int, pair: Pair, console: Console) -> None:
    """A line."""
    ratio = pair.ratio(lambda spent: spent.all_s)
    console.print(
        f"pair {number:2}: {pair.observed.all_s:.4f} s with, {pair.plain.all_s:.4f} s without: {ratio:.4f}",
        soft_wrap=True,
    )


def show_median(pairs: Sequence[Pair], spans: int, console: Console) -> None:
    """The result."""
    of_all = median(pair.ratio(lambda spent: spent.all_s) for pair in pairs)
    of_workers = median(pair.ratio(lambda spent: spent.workers_s) for pair in pairs)
    of_others = median(pair.ratio(lambda spent: spent.others_s) for pair in pairs)
    console.print(
        f"Median ratio of {len(pairs)} pairs: {of_all:.4f} (workers {of_workers:.4f}, all others {of_others:.4f}); "
        f"{spans} spans came.",
        soft_wrap=True,
    )
