"""`python -m tests.chaos [MEMBER ...]`: every fault of every member, or of those named; prints a table.

Ends with status 1 if callers saw what they must not see.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.callers import ENDS
from tests.chaos.cells import FAULTS, MEMBERS, OPTIONS, Cell, measure, start
from tests.flows.headrace_up import HeadraceUp


def main(members: list[str]) -> int:
    console = Console(highlight=False, width=140)
    with tempfile.TemporaryDirectory(prefix="headrace-chaos-") as folder:
        stack = HeadraceUp(Path(folder), *OPTIONS)
        try:
            callers = start(stack)
            cells = []
            for member in members or MEMBERS:
                for fault in FAULTS:
                    cells.append(asyncio.run(measure(stack, callers, member, fault)))
                    _report(cells[-1], console)
        finally:
            stack.kill()
    console.print(_table(cells))
    return int(any(cell.failures for cell in cells))


def _report(cell: Cell, console: Console) -> None:
    console.print(f"{cell.member} {cell.fault}: {', '.join(cell.failures) or 'good'}")
    for note in cell.seen.notes[:5]:
        console.print(f"  {note[:300]}")


def _table(cells: list[Cell]) -> Table:
    table = Table("member", "fault", "accepted", *ENDS, "longest pause s", "wait s")
    for column in table.columns[2:]:
        column.justify = "right"
    for cell in cells:
        figures = (cell.seen.accepted, *(cell.seen.ends[end] for end in ENDS))
        seconds = (cell.seen.longest_pause_s, cell.seen.longest_wait_s)
        table.add_row(cell.member, cell.fault, *map(str, figures), *(f"{each:.1f}" for each in seconds))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
