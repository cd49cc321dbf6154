"""What `headrace bench-observing` makes of its figures."""

from io import StringIO

from rich.console import Console

from toolkit.bench_observing import Pair, Spent
from toolkit.bench_observing_report import show_median, show_pair


def test_pairs_and_their_median() -> None:
    out = StringIO()
    console = Console(file=out, width=40)
    plain = Spent(workers_s=3.0, others_s=1.0)
    pairs = [Pair(Spent(workers_s, others_s), plain) for workers_s, others_s in ((3.0, 1.2), (3.03, 1.01), (9.0, 1.1))]
    show_pair(1, pairs[0], console)
    show_median(pairs, 42, console)
    assert out.getvalue().splitlines() == [
        "pair  1: 4.2000 s with, 4.0000 s without: 1.0500",
        "Median ratio of 3 pairs: 1.0500 (workers 1.0100, all others 1.1000); 42 spans came.",
    ]
