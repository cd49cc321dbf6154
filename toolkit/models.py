"""`headrace models pull`: fetches a model into the local store.

The store belongs to the worker's side, which has the libraries to read models; this runs its command and draws what it
reports, one JSON object a line: {"stage": words, "fraction": 0 to 1} while it works, {"path": folder} or
{"error": sentence} at its end.
"""

import asyncio
import json
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from services.common.config import child_environment


class PullFailed(Exception):
    """The model could not be fetched; the message is the store's own sentence."""


async def pull_model(name: str, console: Console) -> str:
    """Fetches a model; returns its folder. Raises PullFailed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "services.worker.pull", name, "--json"),
        env=child_environment("worker", {}),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None  # a pipe was asked for
    outcome = await draw_progress(process.stdout, console)
    status = await process.wait()
    if "path" not in outcome:
        raise PullFailed(outcome.get("error") or f"Fetching {name} ended with status {status}.")
    return outcome["path"]


async def draw_progress(reports: asyncio.StreamReader, console: Console) -> dict[str, str]:
    """Draws a bar per stage until the reports end; returns the last report that was not about progress."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    outcome: dict[str, str] = {}
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console) as progress:
        async for line in reports:
            report = json.loads(line)
            if "stage" not in report:
                outcome = report
                continue
            stage = report["stage"]
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=1.0)
            progress.update(bars[stage], completed=report["fraction"])
    return outcome
