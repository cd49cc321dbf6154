"""`headrace costs`: its options and what it prints."""

import asyncio
import json
from datetime import UTC, date, datetime
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from services.common.errors import HeadraceError
from services.common.machine_costs import NANOS, MachineCosts
from services.common.redis.client import RedisClient
from services.common.redis.costs import CostStore
from services.common.redis.key_store import KeyStore
from toolkit.command_line import RedisUrl, fail, runs
from toolkit.costs import BadSince, Rows, as_json, first_day, per_thousand_tokens, read_costs, total
from toolkit.run_directory import UnclearStack, redis_url_of, running_stacks
from toolkit.tables import new_table, print_whole


class Grouping(StrEnum):
    KEY = "key"
    MODEL = "model"
    DAY = "day"


def costs(
    by: Annotated[Grouping, typer.Option(help="What each line adds up.")] = Grouping.DAY,
    since: Annotated[str, typer.Option(help="First day (UTC): 7d, or 2026-01-31. The last one is today.")] = "30d",
    redis_url: RedisUrl = None,
    json_wanted: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shows what requests cost: measured machine time at the workers' prices, not the prices that callers pay."""
    try:
        today = datetime.now(UTC).date()
        rows, names = asyncio.run(_read(by, first_day(since, today), today, redis_url))
    except (BadSince, UnclearStack, HeadraceError) as error:
        fail(str(error))
    if json_wanted:
        typer.echo(json.dumps([{by.value: name, **as_json(row)} for name, row in rows.items()], indent=1))
    elif not rows:
        typer.echo("No request has ended in that time.")
    else:
        _show(by, rows, names)


async def _read(by: Grouping, first: date, last: date, redis_url: str | None) -> tuple[Rows, dict[str, str]]:
    """The rows, and what people call the keys among them."""
    redis = RedisClient(redis_url_of(running_stacks(runs()), redis_url))
    try:
        names = {key.id: key.name for key in await KeyStore(redis).all()} if by is Grouping.KEY else {}
        return await read_costs(CostStore(redis), by.value, first, last), names
    finally:
        await redis.close()


def _show(by: Grouping, rows: Rows, names: dict[str, str]) -> None:
    figures = ("requests", "prompt", "cached", "output", "prefill s", "decode s", "cost", "per 1,000", "saved")
    table = new_table(by.value, *figures)
    for name, row in rows.items():
        table.add_row(f"{name} {names.get(name, '')}".rstrip(), *_cells(row))
    table.add_row("all", *_cells(total(rows)), style="bold")
    print_whole(table, Console(highlight=False))


def _cells(row: MachineCosts) -> tuple[str, ...]:
    money = (row.nanos / NANOS, per_thousand_tokens(row), row.saved_prefix_nanos / NANOS)
    tokens = (row.requests, row.prompt_tokens, row.cached_prompt_tokens, row.completion_tokens)
    seconds = (row.prefill_ns / NANOS, row.decode_ns / NANOS)
    told = [f"{count:,}" for count in tokens]
    return (*told, *(f"{time:,.1f}" for time in seconds), *(f"{amount:.6f}" for amount in money))
