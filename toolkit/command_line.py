"""What the modules of the `headrace` command share: how an error is told, where this machine's stacks and Redis are."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from services.common.config import home_directory

REDIS_VARIABLE = "HEADRACE_REDIS_URL"
"""As services have it, and in no list of processes, where a password in an option would stand."""
RedisUrl = Annotated[
    str | None,
    typer.Option(envvar=REDIS_VARIABLE, help="Redis of the stack. Default: that of the stack that runs here."),
]


def fail(message: str) -> NoReturn:
    """Ends the command with one sentence for the person."""
    typer.echo(f"headrace: {message}", err=True)
    raise typer.Exit(1)


def runs() -> Path:
    """The folder of the stacks that run on this machine, each with a folder of its own."""
    return home_directory("state") / "run"
