"""Prints what `headrace bench-gateway` measured."""

from collections.abc import Callable, Sequence
from statistics import median

from rich.console import Console

from toolkit.bench_gateway import (
    IDLE_CONNECTIONS,
    PACED,
    SHORT,
    SLOW_READERS,
    STEP_MS,
    CostRow,
    CpuOfLoad,
    MemoryRow,
    SlowRow,
)
from toolkit.tables import new_table, print_whole


def show_cost(rows: Sequence[CostRow], console: Console) -> None:
    """The cost table, medians of all rounds; then where ours goes."""
    console.print(
        f"CPU seconds of all but workers and clients: {PACED[0]} streams of {PACED[1]} tokens, {STEP_MS} ms a step; "
        f"{SHORT[0]} requests of one token at a time. TTFT: one stream.",
        soft_wrap=True,
    )
    columns = (
        "",
        "s/1,000\ntokens",
        "events/\ntoken",
        "tok/s",
        "s/1,000\nrequests",
        "req/s",
        "TTFT\np50 ms",
        "RSS MiB",
    )
    table = new_table(*columns)
    for row in rows:
        table.add_row(
            row.name,
            f"{_median(row.paced, lambda load: load.per_1000_tokens):.4f}",
            f"{_median(row.paced, lambda load: load.chats.events / load.tokens):.2f}",
            f"{_median(row.paced, lambda load: load.tokens / load.chats.seconds):.0f}",
            f"{_median(row.short, lambda load: load.per_1000_requests):.3f}",
            f"{_median(row.short, lambda load: load.chats.requests / load.chats.seconds):.0f}",
            f"{median(row.ttft_ms):.2f}",
            " + ".join(f"{mib:.0f}" for mib in row.rss_mib.values()),
        )
    print_whole(table, console)
    ours = rows[0]
    whole_ms, own_ms = median(ours.prompt_ttft_ms), median(ours.worker_ttft_ms)
    console.print(
        f"Where the engine answers at once, TTFT is {whole_ms:.2f} ms p50, the worker's own {own_ms:.2f} ms: "
        f"ours adds {whole_ms - own_ms:.2f} ms.",
        soft_wrap=True,
    )
    _show_services(ours, console)


def _show_services(ours: CostRow, console: Console) -> None:
    table = new_table("ours, by service", "s/1,000 tokens", "s/1,000 requests")
    for service in ours.paced[0].cpu_s:
        per_token = median(1000 * load.cpu_s[service] / load.tokens for load in ours.paced)
        per_request = median(1000 * load.cpu_s[service] / load.chats.requests for load in ours.short)
        table.add_row(service, f"{per_token:.4f}", f"{per_request:.3f}")
    print_whole(table, console)


def show_slow(row: SlowRow, console: Console) -> None:
    """What slow clients cost the others: the median of the rounds' ratios, and all of them."""
    ratios = [beside / alone for alone, beside in zip(row.alone_ms, row.beside_ms, strict=True)]
    console.print(
        f"TTFT p50 of others: {median(row.alone_ms):.2f} ms alone, {median(row.beside_ms):.2f} ms beside "
        f"{SLOW_READERS} slow readers and {IDLE_CONNECTIONS:,} idle connections: {median(ratios):.2f}x "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}); the gateway's RSS is then {row.rss_mib:.0f} MiB.",
        soft_wrap=True,
    )


def show_memory(row: MemoryRow, console: Console) -> None:
    """The gateway's memory over many requests."""
    console.print(
        f"The gateway's RSS: {row.before_mib:.0f} MiB, and {row.after_mib:.0f} MiB {row.requests:,} requests later."
    )


def _median(loads: Sequence[CpuOfLoad], figure: Callable[[CpuOfLoad], float]) -> float:
    return median(figure(load) for load in loads)
