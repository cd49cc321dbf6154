"""What `headrace bench-gateway` makes of its figures."""

from io import StringIO

from rich.console import Console

from toolkit.bench_gateway import CostRow, CpuOfLoad, MemoryRow, SlowRow
from toolkit.bench_gateway_report import show_cost, show_memory, show_slow
from toolkit.chat_load import ChatResult


def shown(rows: list[CostRow]) -> list[str]:
    out = StringIO()
    show_cost(rows, Console(file=out, width=120))
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def load(requests: int, tokens: int, **cpu_s: float) -> CpuOfLoad:
    return CpuOfLoad(ChatResult(seconds=2.0, requests=requests, events=tokens // 2), tokens, cpu_s)


def test_medians_over_rounds_and_what_is_added() -> None:
    paced = [load(10, 1000, gateway=gateway, redis=0.01) for gateway in (0.03, 0.05, 0.9)]
    short = [load(100, 100, gateway=0.08, redis=0.02)]
    row = CostRow("ours", paced, short, [12.0, 13.0, 99.0], [4.0, 3.5, 9.0], [1.5], {"gateway": 90.0, "redis": 14.0})
    lines = shown([row])
    assert "ours 0.0600 0.50 500 1.000 50 13.00 90 + 14" in lines
    assert any("TTFT is 4.00 ms p50, the worker's own 1.50 ms: ours adds 2.50 ms." in line for line in lines)
    assert "gateway 0.0500 0.800" in lines
    assert "redis 0.0100 0.200" in lines


def test_slow_clients_and_memory_in_a_sentence() -> None:
    out = StringIO()
    console = Console(file=out, width=200)
    show_slow(SlowRow([4.0, 4.0, 2.0], [5.0, 8.0, 2.0], rss_mib=120.4), console)
    show_memory(MemoryRow(100_000, 95.2, 96.7), console)
    slow, memory = out.getvalue().splitlines()
    assert slow.startswith("TTFT p50 of others: 4.00 ms alone, 5.00 ms beside 500 slow readers")
    assert "2,000 idle connections: 1.25x (1.25, 2.00, 1.00); the gateway's RSS is then 120 MiB." in slow
    assert memory == "The gateway's RSS: 95 MiB, and 97 MiB 100,000 requests later."
