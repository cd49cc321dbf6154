"""What the modules of the `headrace` command share: how an error is told, where this machine's stacks and Redis are."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from services.common.config import home_directory

REDIS_VARIABLE = "HEADRACE_REDIS_URL"
"""As services have it, and in no list of processes, where a password in an option would stand."""


def fail(message: str) -> NoReturn:
    """Ends the command with one sentence for the person."""
    typer.echo(f"headrace: {message}", err=True)
    raise typer.Exit(1)


def checked_redis_url(url: str | None) -> str | None:
    """The callback of options that take one. What is wrong is not told: the parser's message may hold a password."""
    if not url:
        return url
    # Commands that reach no Redis would wait for this import, too.
    from services.common.redis.client import is_redis_url

    if not is_redis_url(url):
        fail(
            f"--redis-url or {REDIS_VARIABLE} is not a URL of the form redis://[[USER]:PASSWORD@]HOST:PORT[/DATABASE] "
            "or rediss://... (in a password, / is %2F, # is %23, ? is %3F and @ is %40)."
        )
    return url


RedisUrl = Annotated[
    str | None,
    typer.Option(
        envvar=REDIS_VARIABLE,
        callback=checked_redis_url,
        help="Redis of the stack. Default: that of the stack that runs here.",
    ),
]


def runs() -> Path:
    """The folder of the stacks that run on this machine, each with a folder of its own."""
    return home_directory("state") / "run"
