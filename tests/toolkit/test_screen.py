"""What a person sees while a stack starts, in a terminal and elsewhere."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from toolkit import screen as screen_module
from toolkit.process import ProcessSpec, State, SupervisedProcess
from toolkit.screen import LineScreen, TableScreen, open_screen


async def ready() -> bool:
    return True


def process(folder: Path, state: State, pid: int | None = 12) -> SupervisedProcess:
    spec = ProcessSpec("worker", "127.0.0.1:9", ("true",), {}, folder / "worker.log", ready, 1.0)
    shown = SupervisedProcess(spec, lambda: None)
    shown.state, shown.pid = state, pid
    return shown


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def text(shown_on: Console) -> str:
    assert isinstance(shown_on.file, io.StringIO)
    return shown_on.file.getvalue()


def test_lines_tell_each_change_once(tmp_path: Path) -> None:
    out = console()
    screen = LineScreen(out)
    shown = process(tmp_path, State.STARTING, pid=None)
    screen.draw([shown])
    shown.pid = 12
    for _ in range(3):
        screen.draw([shown])
    shown.state = State.READY
    screen.draw([shown])
    shown.state, shown.last_exit_code = State.RESTARTING, -9
    screen.draw([shown])
    assert [line.split(maxsplit=1)[1] for line in text(out).splitlines()] == [
        "starting, pid 12",
        "ready on 127.0.0.1:9",
        "ended by SIGKILL, restarting",
    ]


def test_lines_give_news_of_a_long_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(screen_module.time, "monotonic", lambda: clock[0])
    out = console()
    screen = LineScreen(out)
    shown = process(tmp_path, State.STARTING)
    for clock[0], percent in ((0.0, 1), (1.0, 5), (6.0, 10), (7.0, 15), (12.0, 20), (13.0, 25)):
        shown.spec.log_path.write_text(f"converting {percent}%\r")
        screen.draw([shown])
    assert [line.split()[-1] for line in text(out).splitlines()] == ["12", "10%", "20%"]


def test_a_terminal_shows_a_row_per_process(tmp_path: Path) -> None:
    out = console(terminal=True)
    screen = open_screen(out)
    assert isinstance(screen, TableScreen)
    shown = process(tmp_path, State.STARTING)
    shown.spec.log_path.write_text("converting 10%\n")
    screen.draw([shown])
    assert "converting 10%" in text(out)
    shown.state = State.READY
    screen.draw([shown])
    drawn = len(text(out))
    screen.draw([shown])
    assert len(text(out)) == drawn, "nothing changed, nothing is drawn"
    screen.close()
    assert "127.0.0.1:9" in text(out)
    assert isinstance(open_screen(console()), LineScreen)
