"""Tables of figures, as all commands print them."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_ANY_WIDTH = 10_000


def new_table(*columns: str, words: int = 1) -> Table:
    """Without lines. The first columns, `words` of them, hold words, the others figures."""
    made = Table(*columns, box=None, pad_edge=False)
    for column in made.columns[words:]:
        column.justify = "right"
    return made


def print_whole(made: Table, console: Console) -> None:
    """Leaves it to a narrow terminal to wrap the lines: figures and heads that are cut tell nothing."""
    needed = Measurement.get(console, console.options.update_width(_ANY_WIDTH), made).maximum
    given, console.width = console.width, max(console.width, needed)
    console.print(made, crop=False)
    console.width = given
