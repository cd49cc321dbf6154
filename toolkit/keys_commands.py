"""The subcommands of `headrace keys`, their options and what they print."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console

from services.common.api_keys import MICROS, ApiKey, Limits
from services.common.errors import HeadraceError
from services.common.redis.limits import Standing
from toolkit.command_line import RedisUrl, fail, runs
from toolkit.keys import KeyProblem, KeyRing, MadeKey, expiry, key_json, open_ring, state_of
from toolkit.run_directory import UnclearStack, redis_url_of, running_stacks
from toolkit.tables import new_table, print_whole

T = TypeVar("T")

keys_app = typer.Typer(help="API keys, with their limits and budgets.", no_args_is_help=True)


class KeyPriority(StrEnum):
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Which = Annotated[str, typer.Argument(help="Id or name of a key, as `headrace keys list` shows it.")]
RequestsPerMinute = Annotated[int | None, typer.Option(min=1, help="Requests in any 60 s.")]
TokensPerMinute = Annotated[int | None, typer.Option(min=1, help="Prompt and completion tokens in any 60 s.")]
Concurrent = Annotated[int | None, typer.Option(min=1, help="Requests that run or wait at once.")]
TokensPerDay = Annotated[int | None, typer.Option(min=1, help="Prompt and completion tokens in any 24 h.")]
MoneyPerMonth = Annotated[str | None, typer.Option(help="Money in any 31 days, in the unit of the prices.")]


@keys_app.command()
def create(
    name: Annotated[str, typer.Argument(help="What people call it.")] = "",
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent: Concurrent = None,
    tokens_per_day: TokensPerDay = None,
    money_per_month: MoneyPerMonth = None,
    models: Annotated[str, typer.Option(help="Models it may use, comma-separated. Default: all.")] = "",
    scopes: Annotated[str, typer.Option(help="What it may do: generate, models.")] = "generate,models",
    expires: Annotated[str | None, typer.Option(help="Works this long, such as 30d or 12h. Default: for good.")] = None,
    priority: Annotated[
        KeyPriority, typer.Option(help="Of its requests, unless they name a lower one.")
    ] = KeyPriority.NORMAL,
    cache_salt: Annotated[
        str, typer.Option(help="Keys with the same one share cached prefixes. Default: it shares none.")
    ] = "",
    group: Annotated[str, typer.Option(help="Group whose limits it shares.")] = "",
    redis_url: RedisUrl = None,
    as_json: AsJson = False,
) -> None:
    """Makes a key and prints it, this once: only its hash is kept."""
    limits = _limits(requests_per_minute, tokens_per_minute, concurrent, tokens_per_day, money_per_month)
    fields = {
        **limits,
        "models": _split(models),
        "scopes": _split(scopes),
        "priority": priority.value,
        "cache_salt": cache_salt,
        "group": group,
    }

    async def work(ring: KeyRing) -> MadeKey:
        return await ring.create(name, {**fields, "expires": expiry(expires)})

    _print_made(_with_ring(redis_url, work), as_json)


@keys_app.command(name="list")
def list_keys(redis_url: RedisUrl = None, as_json: AsJson = False) -> None:
    """Lists all keys, revoked and expired ones included."""
    keys = _with_ring(redis_url, lambda ring: ring.all())
    if as_json:
        typer.echo(json.dumps([{**key_json(key), "state": state_of(key)} for key in keys]))
        return
    table = new_table("id", "name", "group", "state", "expires", "limits", words=6)
    for key in keys:
        limits = ", ".join(f"{name}={amount}" for name, amount in _told_limits(key).items())
        table.add_row(key.id, key.name, key.group, state_of(key), str(key.expires or ""), limits)
    print_whole(table, Console(highlight=False))


@keys_app.command()
def show(key: Which, redis_url: RedisUrl = None, as_json: AsJson = False) -> None:
    """Shows a key and how much of its limits, and of its group's, is used."""

    async def work(ring: KeyRing) -> tuple[ApiKey, dict[str, Standing]]:
        found = await ring.find(key)
        return found, await ring.use(found)

    found, standings = _with_ring(redis_url, work)
    use = {name: _told_use(name, standing) for name, standing in standings.items()}
    if as_json:
        typer.echo(json.dumps({**key_json(found), "state": state_of(found), "use": use}))
        return
    for name, value in {**key_json(found), "state": state_of(found)}.items():
        if value and name not in use:
            typer.echo(f"{name:22} {', '.join(value) if isinstance(value, list) else value}")
    for name, told in use.items():
        typer.echo(f"{name:22} {told['used']} used, {told['held']} held, of {told['limit']}")


@keys_app.command()
def rotate(key: Which, redis_url: RedisUrl = None, as_json: AsJson = False) -> None:
    """Gives a key a new secret and prints it, this once; the old one stops working within 2 s."""
    _print_made(_with_ring(redis_url, lambda ring: ring.rotate(key)), as_json)


@keys_app.command()
def revoke(key: Which, redis_url: RedisUrl = None, as_json: AsJson = False) -> None:
    """Ends a key for good: it stops working within 2 s."""
    revoked = _with_ring(redis_url, lambda ring: ring.revoke(key))
    typer.echo(json.dumps(key_json(revoked)) if as_json else f"{revoked.id} {revoked.name} is revoked.")


@keys_app.command()
def group(
    name: Annotated[str, typer.Argument(help="Name of the group.")],
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent: Concurrent = None,
    tokens_per_day: TokensPerDay = None,
    money_per_month: MoneyPerMonth = None,
    no_limits: Annotated[bool, typer.Option("--no-limits", help="Take away those that it has.")] = False,
    redis_url: RedisUrl = None,
    as_json: AsJson = False,
) -> None:
    """Sets the limits that all keys of a group share: those given here, and no others. Without any: shows them."""
    given = _limits(requests_per_minute, tokens_per_minute, concurrent, tokens_per_day, money_per_month)
    is_given = any(amount is not None for amount in given.values())
    if is_given and no_limits:
        fail("--no-limits takes no limits beside it.")

    async def work(ring: KeyRing) -> Limits:
        if is_given or no_limits:
            await ring.set_group(name, Limits.model_validate(given))
        return await ring.group(name)

    limits = _with_ring(redis_url, work)
    if as_json:
        typer.echo(json.dumps({"group": name, **limits.model_dump(mode="json", exclude_none=True)}))
        return
    told = ", ".join(f"{limit}={amount}" for limit, amount in _told_limits(limits).items())
    typer.echo(f"The keys of group {name} share: {told or 'no limits'}.")


def _limits(
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    concurrent: int | None,
    tokens_per_day: int | None,
    money_per_month: str | None,
) -> dict[str, Any]:
    try:
        money = None if money_per_month is None else Decimal(money_per_month)
    except InvalidOperation:
        fail(f"--money-per-month: {money_per_month!r} is not a number.")
    return {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent": concurrent,
        "tokens_per_day": tokens_per_day,
        "money_per_month": money,
    }


def _with_ring(redis_url: str | None, work: Callable[[KeyRing], Awaitable[T]]) -> T:
    """Runs on the keys of the stack; tells problems and exits with 1."""

    async def run() -> T:
        async with open_ring(redis_url_of(running_stacks(runs()), redis_url)) as ring:
            return await work(ring)

    try:
        return asyncio.run(run())
    except (KeyProblem, UnclearStack) as error:
        fail(str(error))
    except HeadraceError as error:
        fail(error.message)
    except ValidationError as error:
        fail("; ".join(f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg']}" for item in error.errors()))


def _print_made(made: MadeKey, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"key": made.secret, **key_json(made.key)}))
        return
    typer.echo(made.secret)
    typer.echo("This is the only time that the key is shown.", err=True)


def _told_limits(limits: Limits) -> dict[str, object]:
    values = {name: getattr(limits, name) for name in Limits.model_fields}
    return {name: value for name, value in values.items() if value is not None}


def _told_use(name: str, standing: Standing) -> dict[str, int | float]:
    unit = MICROS if name.endswith("money_per_month") else 1
    amounts = {"used": standing.used, "held": standing.held, "limit": standing.claim.meter.limit}
    return {told: amount if unit == 1 else amount / unit for told, amount in amounts.items()}


def _split(items: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in items.split(",") if item.strip())
