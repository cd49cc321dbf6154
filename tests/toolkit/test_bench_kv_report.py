from io import StringIO

from rich.console import Console

from toolkit.bench_chats import ChatsRow
from toolkit.bench_kv import KvRecord, KvRow
from toolkit.bench_kv_report import show_chats, show_kv, show_split
from toolkit.bench_split import SplitRow


def console() -> Console:
    return Console(file=StringIO(), width=120)


def shown(on: Console) -> list[str]:
    assert isinstance(on.file, StringIO)
    return [" ".join(line.split()) for line in on.file.getvalue().splitlines()]


def test_each_way_stands_beside_what_computing_takes() -> None:
    on = console()
    rows = [KvRow("computed", 2000.0), KvRow("peer", 200.0, mb_per_s=321.4)]
    show_kv(KvRecord(1536, 368_640, rows, fetch_idle=600.2, fetch_busy=250.0), on)
    lines = shown(on)
    assert lines[0].startswith("A prompt of 1536 tokens; a block of 16 has 360 KiB.")
    assert "computed 2000 1.00" in lines
    assert "peer 200 0.10 321" in lines
    assert "600 MB/s with idle engines, 250 MB/s from a worker that decodes" in " ".join(lines)


def test_decodes_beside_prompts() -> None:
    on = console()
    show_split([SplitRow("one worker, chunks", 30.0, 410.25, 190.0, 220.0)], on)
    assert "one worker, chunks 30.0 410.2 190.0 220.0" in shown(on)


def test_chats_of_each_policy_beside_the_first() -> None:
    on = console()
    aware = ChatsRow("kv_aware", 1000, 800, 850, [0.1, 0.2, 0.4], 12.0)
    show_chats([aware, ChatsRow("round_robin", 1000, 500, 850, [0.3], 30.0)], on)
    lines = shown(on)
    assert "kv_aware 1,000 200 1.00 94.1% 200 12" in lines
    assert "round_robin 1,000 500 2.50 58.8% 300 30" in lines
