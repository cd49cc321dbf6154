"""Prints what `headrace bench-kv` measured."""

from collections.abc import Sequence

from rich.console import Console

from toolkit.bench_chats import CONVERSATIONS, TURNS, WORKERS, ChatsRow
from toolkit.bench_kv import KvRecord
from toolkit.bench_split import SplitRow
from toolkit.tables import new_table, print_whole


def show_kv(record: KvRecord, console: Console) -> None:
    """A table of the ways to a prompt's KV, then the plain rates."""
    computed = record.rows[0].first_token_ms
    table = new_table("KV of the prompt", "TTFT p50 ms", "x computed", "MB/s")
    for row in record.rows:
        rate = "" if row.mb_per_s is None else f"{row.mb_per_s:.0f}"
        table.add_row(row.name, f"{row.first_token_ms:.0f}", f"{row.first_token_ms / computed:.2f}", rate)
    console.print(
        f"A prompt of {record.prompt_tokens} tokens; a block of 16 has {record.block_bytes / 1024:.0f} KiB. "
        "MB/s: the bytes that moved over the whole time to the first token.",
        soft_wrap=True,
    )
    print_whole(table, console)
    console.print(
        f"FetchBlocks from one process to another: {record.fetch_idle:.0f} MB/s with idle engines, "
        f"{record.fetch_busy:.0f} MB/s from a worker that decodes."
    )


def show_split(rows: Sequence[SplitRow], console: Console) -> None:
    """What eight decodes saw beside a stream of long prompts."""
    columns = ("8 decodes beside long prompts", "between tokens p50 ms", "p99 ms", "output tok/s", "prompt tok/s")
    table = new_table(*columns)
    for row in rows:
        figures = (
            row.between_tokens_p50_ms,
            row.between_tokens_p99_ms,
            row.output_tokens_per_s,
            row.prompt_tokens_per_s,
        )
        table.add_row(row.way, *(f"{figure:.1f}" for figure in figures))
    print_whole(table, console)


def show_chats(rows: Sequence[ChatsRow], console: Console) -> None:
    """What each placement policy made of the chats, beside the first one."""
    title = f"{CONVERSATIONS} chats of {TURNS} turns over {WORKERS} workers"
    table = new_table(title, "prompt tokens", "computed", "x first", "hits of best", "TTFT p50 ms", "s")
    for row in rows:
        table.add_row(
            row.policy,
            f"{row.prompt_tokens:,}",
            f"{row.computed_tokens:,}",
            f"{row.computed_tokens / rows[0].computed_tokens:.2f}",
            f"{row.hit_share:.1%}",
            f"{row.first_token_p50_ms:.0f}",
            f"{row.wall_s:.0f}",
        )
    print_whole(table, console)
