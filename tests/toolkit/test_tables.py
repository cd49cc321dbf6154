"""Tables of figures."""

from io import StringIO

from rich.console import Console

from toolkit.tables import new_table, print_whole


def test_a_narrow_console_cuts_nothing_and_stays_narrow() -> None:
    console = Console(file=StringIO(), width=20)
    table = new_table("service", "seconds per 1,000 tokens", "of all")
    table.add_row("gateway", "0.0524", "70.2 %")
    print_whole(table, console)
    head, row = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert head.split() == ["service", "seconds", "per", "1,000", "tokens", "of", "all"]
    assert row.index("0.0524") + len("0.0524") == head.index("tokens") + len("tokens"), "figures stand to the right"
    assert console.width == 20
