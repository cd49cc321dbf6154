"""The subcommands of `headrace queue`: requests that were given up, and what becomes of them."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, TypeVar

import typer

from services.common.errors import HeadraceError
from services.common.redis.client import RedisClient
from services.common.redis.dead_letters import DeadLetter, DeadLetters
from toolkit.command_line import RedisUrl, fail, runs
from toolkit.run_directory import UnclearStack, redis_url_of, running_stacks

T = TypeVar("T")

queue_app = typer.Typer(help="The queue's requests.", no_args_is_help=True)
dead_app = typer.Typer(help="Requests that failed on every worker they may.", no_args_is_help=True)
queue_app.add_typer(dead_app, name="dead")

Which = Annotated[str, typer.Argument(metavar="ID", help="As `headrace queue dead list` shows it.")]


@dead_app.command("list")
def list_dead(
    redis_url: RedisUrl = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Shows which requests were given up and why, the oldest first."""
    letters = _with_letters(redis_url, lambda kept: kept.all())
    if as_json:
        typer.echo(json.dumps([_as_json(letter) for letter in letters], indent=1))
    else:
        typer.echo("\n".join(map(_line, letters)) or "No request was given up.")


@dead_app.command()
def requeue(which: Which, redis_url: RedisUrl = None) -> None:
    """Has a request run again, from its beginning. Its answer can be fetched by the id that this prints."""

    async def work(letters: DeadLetters) -> str:
        return await letters.requeue(await _find(letters, which))

    answer_id = _with_letters(redis_url, work)
    typer.echo(f"It runs again as answer {answer_id}: GET /v1/answers/{answer_id}")


@dead_app.command()
def drop(which: Which, redis_url: RedisUrl = None) -> None:
    """Forgets a request."""

    async def work(letters: DeadLetters) -> None:
        await letters.remove(await _find(letters, which))

    _with_letters(redis_url, work)


async def _find(letters: DeadLetters, which: str) -> DeadLetter:
    found = await letters.find(which)
    if found is None:
        fail(f"There is no dead letter {which!r}; `headrace queue dead list` shows them.")
    return found


def _with_letters(redis_url: str | None, work: Callable[[DeadLetters], Awaitable[T]]) -> T:
    async def run() -> T:
        redis = RedisClient(redis_url_of(running_stacks(runs()), redis_url))
        try:
            return await work(DeadLetters(redis))
        finally:
            await redis.close()

    try:
        return asyncio.run(run())
    except (UnclearStack, HeadraceError) as error:
        fail(str(error))


def _as_json(letter: DeadLetter) -> dict[str, object]:
    request = letter.request
    return {
        "id": letter.entry_id,
        "at": _time(letter),
        "request_id": request.internal_id,
        "key_id": request.key_id,
        "model": request.model,
        "prompt_tokens": len(request.prompt_ids) // 4,
        "failures": letter.failures,
        "reason": letter.reason,
    }


def _line(letter: DeadLetter) -> str:
    fields = _as_json(letter)
    what = "{id}  {at}  request {request_id}, model {model}, {prompt_tokens} prompt tokens: {reason}"
    return what.format_map(fields)


def _time(letter: DeadLetter) -> str:
    return datetime.fromtimestamp(letter.unix_s, UTC).isoformat(timespec="seconds")
