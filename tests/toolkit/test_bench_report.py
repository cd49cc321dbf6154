"""The tables: medians, ratios, and how wide they get."""

import io

from rich.console import Console

from tests.toolkit.bench_figures import measurement, record
from toolkit.bench_record import Record
from toolkit.bench_report import format_ratio, invalid_figures, medians, rate_of, show, ttft_p50_ms
from toolkit.loadtest import ROWS


def printed(shown: Record) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    show(shown, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_medians_over_the_rounds() -> None:
    rounds = [measurement("ours", "single", number=number, ttft_ms=ms) for number, ms in enumerate((90, 10, 20))]
    assert medians([*rounds, measurement("peer", "single", ttft_ms=5)], ttft_p50_ms) == {
        ("ours", "single"): 20,
        ("peer", "single"): 5,
    }


def test_a_row_of_prompts_is_rated_by_its_prompts() -> None:
    rate = rate_of(ROWS)
    assert (rate(measurement("ours", "single", output=5)), rate(measurement("ours", "prefill", output=5))) == (5, 50)


def test_the_ratio_is_ours_over_theirs() -> None:
    assert (format_ratio(30, 20), format_ratio(1, 0)) == ("1.50x", "-")


def test_one_server_has_its_details_alone() -> None:
    _blank, title, *lines = printed(record(measurement("ours", "single")))
    assert title == "ours: medians over the rounds, as the clients saw them"
    cells = "single 50.0 500.0 100.0 200.0 20.0 9.00 1.00 10.0% 500 0"
    assert cells.split() in [line.split() for line in lines]


def test_what_the_server_tells_of_its_time_is_shown() -> None:
    *_, title, headings, cells = printed(
        record(*(measurement("ours", "single", number=number, ttft_ms=ms) for number, ms in enumerate((90, 10, 20))))
    )
    assert title == "ours: where a request's time went by the server's own account, ms"
    assert (headings.split(), cells.split()) == (["row", "total", "prefill"], ["single", "60.0", "15.0"])


def test_a_server_without_known_processes_has_no_cpu_figures() -> None:
    assert printed(record(measurement("--url", "single")))[-1].split()[6:] == ["-", "-", "-", "-", "0"]


def test_peers_are_compared_row_by_row() -> None:
    shown = record(
        measurement("ours", "single", output=60, ttft_ms=100),
        measurement("vllm", "single", output=40, ttft_ms=50),
        measurement("other", "single", output=120, ttft_ms=400),
        measurement("ours", "prefill", output=60, ttft_ms=100),
        measurement("vllm", "prefill", output=30, ttft_ms=25),
        measurement("other", "prefill", output=120, ttft_ms=400),
    )
    lines = [line.split() for line in printed(shown)]
    assert "row unit ours vllm ratio other ratio".split() in lines
    assert "single output tok/s 60.0 40.0 1.50x 120.0 0.50x".split() in lines
    assert "prefill prompt tok/s 600.0 300.0 2.00x 1200.0 0.50x".split() in lines
    assert "single ms 100.0 50.0 2.00x 400.0 0.25x".split() in lines
    assert "single ms 20.0 20.0 1.00x 20.0 1.00x".split() in lines


def test_tables_fit_120_columns() -> None:
    rows = [measurement(server, row.name, output=12345) for row in ROWS for server in ("ours", "vllm", "llama.cpp")]
    lines = printed(record(*rows))
    assert max(map(len, lines)) <= 120
    assert "…" not in "".join(lines)


def test_the_batching_policies_are_compared_figure_by_figure() -> None:
    continuous = measurement("continuous", "mixed", output=60, ttft_ms=100)
    static = measurement("static", "mixed", output=40, ttft_ms=400)
    lines = [line.split() for line in printed(record(measurement("ours", "single"), batching=(continuous, static)))]
    assert "output tok/s higher 60.0 40.0 1.50x".split() in lines
    assert "TTFT p99 ms lower 200.0 800.0 0.25x".split() in lines


def test_answers_of_another_length_make_figures_invalid() -> None:
    shown = record(
        measurement("ours", "single"),
        measurement("vllm", "single", short=2),
        measurement("vllm", "single", number=1, short=1),
        batching=(measurement("static", "mixed", short=1),),
    )
    first, second = invalid_figures(shown)
    assert first == "NOT VALID: vllm, row single: 3 answers have another length than was asked for."
    assert "static, row mixed: 1 answers" in second
