"""What a stack looks like while it runs: a table that redraws itself in a terminal, plain lines anywhere else."""

import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from toolkit.log_tail import last_line
from toolkit.process import State, SupervisedProcess, describe_exit

_STYLES = {
    State.STARTING: "yellow",
    State.READY: "green",
    State.NOT_READY: "yellow",
    State.RESTARTING: "red",
    State.STOPPING: "yellow",
    State.STOPPED: "dim",
    State.FAILED: "bold red",
}
_NEWS_EVERY_S = 5.0


class Screen(Protocol):
    """Shows processes. `draw` is called when something changed, and a few times a second."""

    def draw(self, processes: Sequence[SupervisedProcess]) -> None: ...

    def close(self) -> None: ...


def open_screen(console: Console) -> Screen:
    return TableScreen(console) if console.is_terminal else LineScreen(console)


class TableScreen:
    """One row per process at the bottom of the terminal; what is printed meanwhile appears above it."""

    def __init__(self, console: Console) -> None:
        self._rows: list[tuple[str, str, str, str]] = []
        self._live = Live(console=console, auto_refresh=False)
        self._live.start()

    def draw(self, processes: Sequence[SupervisedProcess]) -> None:
        rows = [_row(process) for process in processes]
        if rows == self._rows:  # a redraw would undo the selection of somebody who copies from the terminal
            return
        self._rows = rows
        table = Table(box=None, show_header=False, pad_edge=False)
        for process, (name, state, pid, words) in zip(processes, rows, strict=True):
            news = Text(words, style="dim", no_wrap=True, overflow="ellipsis")
            table.add_row(name, Text(state, style=_STYLES[process.state]), pid, news)
        self._live.update(table, refresh=True)

    def close(self) -> None:
        self._live.stop()


def _row(process: SupervisedProcess) -> tuple[str, str, str, str]:
    ready = process.state is State.READY
    words = process.spec.address if ready else last_line(process.spec.log_path)
    return process.spec.name, process.state.value, f"pid {process.pid}" if process.pid else "", words


class LineScreen:
    """A line per change of state, and news from the log of a process that takes long to start."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, tuple[State, int | None]] = {}
        self._news: dict[str, tuple[float, str]] = {}

    def draw(self, processes: Sequence[SupervisedProcess]) -> None:
        for process in processes:
            if process.state is State.STARTING and process.pid is None:  # it has not even begun
                continue
            now = (process.state, process.pid)
            if self._shown.get(process.spec.name) != now:
                self._shown[process.spec.name] = now
                self._print(process, _describe(process))
            elif process.state is State.STARTING:
                self._tell_news(process)

    def close(self) -> None:
        """Nothing to undo: lines stay."""

    def _tell_news(self, process: SupervisedProcess) -> None:
        told_at, told = self._news.setdefault(process.spec.name, (time.monotonic(), ""))
        if time.monotonic() - told_at < _NEWS_EVERY_S:
            return
        line = last_line(process.spec.log_path)
        self._news[process.spec.name] = (time.monotonic(), line)
        if line != told:
            self._print(process, line)

    def _print(self, process: SupervisedProcess, words: str) -> None:
        self._console.print(Text(f"{process.spec.name:<10} {words}"), soft_wrap=True)


def _describe(process: SupervisedProcess) -> str:
    match process.state:
        case State.STARTING:
            return f"starting, pid {process.pid}"
        case State.READY:
            return f"ready on {process.spec.address}"
        case State.RESTARTING if process.last_exit_code is not None:
            return f"ended {describe_exit(process.last_exit_code)}, restarting"
        case state:
            return state.value
