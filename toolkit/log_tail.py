"""The end of a log file. A progress bar's carriage returns count as line ends, colors are taken out."""

import re
from pathlib import Path

_TAIL_BYTES = 16 * 1024
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines that are not blank; none if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            tail = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", _ESCAPES.sub("", tail))]
    return [line for line in lines if line][-count:]


def last_line(path: Path) -> str:
    """The last line that is not blank, or an empty string."""
    return next(iter(last_lines(path, 1)), "")
