"""The end of a log, with progress bars and colors in it."""

from pathlib import Path

from toolkit.log_tail import last_line, last_lines


def test_progress_bars_and_colors(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\n\x1b[32mconverting\x1b[0m 10%\rconverting 20%\r\n\n")
    assert last_line(log) == "converting 20%"
    assert last_lines(log, 2) == ["converting 10%", "converting 20%"]


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"\xc3\xa9" * 100_000 + b"\nlast\n")
    assert last_line(log) == "last"


def test_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    assert last_line(tmp_path / "log") == ""
