"""`python -m services.worker.pull NAME`: brings a model into the store and prints its folder.

Progress goes to stderr: a bar on a terminal, a line per stage elsewhere. With --json, stdout gets one JSON object per
line: {"stage": ..., "fraction": ...} while it works, last {"path": ...} or {"error": ...}. Exit status 1 on failure,
2 on a bad setting; the store and whether a repository's code comes along are the worker's settings.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from services.common import config
from services.worker.config import WorkerSettings
from services.worker.engine.model.interface import ModelError
from services.worker.model_store import resolve

Report = Callable[[str, float], None]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.worker.pull", description="Bring a model into the store.")
    parser.add_argument("name", help="a folder, a .gguf file, a hub id (org/name or org/name@revision), or default")
    parser.add_argument("--store", type=Path, help="root of the store (default: the worker's setting `store`)")
    parser.add_argument("--json", action="store_true", help="report progress and result as JSON lines on stdout")
    arguments = parser.parse_args()
    settings = config.load(WorkerSettings, "worker")
    try:
        with _reporter(arguments.json) as report:
            path = resolve(
                arguments.name,
                root=arguments.store or settings.store,
                remote_code=settings.trust_remote_code,
                progress=report,
            )
    except ModelError as error:
        if arguments.json:
            print(json.dumps({"error": str(error)}))
        else:
            print(error, file=sys.stderr)
        return 1
    print(json.dumps({"path": str(path)}) if arguments.json else path)
    return 0


def _reporter(as_json: bool) -> AbstractContextManager[Report]:
    if as_json:
        return nullcontext(_json_line)
    return _Bar() if sys.stderr.isatty() else nullcontext(_StageLines())


def _json_line(stage: str, fraction: float) -> None:
    print(json.dumps({"stage": stage, "fraction": round(fraction, 4)}), flush=True)


class _StageLines:
    """One line per stage."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, stage: str, fraction: float) -> None:
        if stage != self._stage:
            print(f"{fraction:4.0%}  {stage}", file=sys.stderr, flush=True)
        self._stage = stage


class _Bar:
    """A bar that keeps moving its spinner and clock between reports."""

    def __enter__(self) -> Report:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=Console(file=sys.stderr), transient=True)
        self._task = self._progress.add_task("looking", total=1.0)
        self._progress.start()
        return self._report

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _report(self, stage: str, fraction: float) -> None:
        self._progress.update(self._task, description=stage, completed=fraction)


if __name__ == "__main__":
    sys.exit(main())
