"""What the modules of the `headrace` command share: how an error is told, and where this machine's stacks are."""

from pathlib import Path
from typing import NoReturn

import typer

from services.common.config import home_directory


def fail(message: str) -> NoReturn:
    """Ends the command with one sentence for the person."""
    typer.echo(f"headrace: {message}", err=True)
    raise typer.Exit(1)


def runs() -> Path:
    """The folder of the stacks that run on this machine, each with a folder of its own."""
    return home_directory("state") / "run"
