"""The tables of a benchmark: medians over the rounds, and server against server."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from rich.console import Console
from rich.table import Table

from toolkit.bench_record import Measurement, Record
from toolkit.cpu_time import CpuUse
from toolkit.loadtest import Row
from toolkit.tables import new_table, print_whole

Figure = Callable[[Measurement], float]


def show(record: Record, console: Console) -> None:
    """Prints every table that the record has figures for."""
    first, *others = servers_of(record.measurements)
    ratio = f"ratio: {first} as a multiple of the other"
    of_first = [m for m in record.measurements if m.server == first]
    tables = {f"{first}: medians over the rounds, as the clients saw them": _details(of_first)}
    if any(m.result.server_ms for m in of_first):
        tables[f"{first}: where a request's time went by the server's own account, ms"] = _server_times(of_first)
    if others:
        units = {row.name: f"{row.rate} tok/s" for row in record.rows}
        rates = _comparison(record.measurements, rate_of(record.rows), units)
        tables[f"Rates; {ratio} (higher is better)"] = rates
        waits = _comparison(record.measurements, ttft_p50_ms, dict.fromkeys(units, "ms"))
        tables[f"Time to the first token, p50; {ratio} (lower is better)"] = waits
        gaps = _comparison(record.measurements, inter_token_p50_ms, dict.fromkeys(units, "ms"))
        tables[f"Time between tokens, p50; {ratio} (lower is better)"] = gaps
    if record.batching:
        tables["The same work under each batching policy, and the ratio of the two"] = _batching(record.batching)
    for title, table in tables.items():
        console.print(f"\n{title}", soft_wrap=True)
        print_whole(table, console)


def invalid_figures(record: Record) -> list[str]:
    """A line for each server and row with answers not as long as asked for: its figures tell nothing."""
    counts: dict[tuple[str, str], int] = {}
    for m in (*record.measurements, *record.batching):
        counts[m.server, m.result.row] = counts.get((m.server, m.result.row), 0) + m.result.short_answers
    return [
        f"NOT VALID: {server}, row {row}: {count} answers have another length than was asked for."
        for (server, row), count in counts.items()
        if count
    ]


def medians(measurements: Sequence[Measurement], figure: Figure) -> dict[tuple[str, str], float]:
    """By server and row, the median of a figure over the rounds."""
    values: dict[tuple[str, str], list[float]] = {}
    for measurement in measurements:
        values.setdefault((measurement.server, measurement.result.row), []).append(figure(measurement))
    return {key: median(rounds) for key, rounds in values.items()}


def rate_of(rows: Sequence[Row]) -> Figure:
    """The rate in tokens per second that tells how fast a row was done: of its output, or of its prompts."""
    kinds = {row.name: row.rate for row in rows}
    return lambda m: m.result.rate(kinds[m.result.row])


def ttft_p50_ms(measurement: Measurement) -> float:
    return measurement.result.ttft_p50_ms


def inter_token_p50_ms(measurement: Measurement) -> float:
    return measurement.result.inter_token_p50_ms


def servers_of(measurements: Sequence[Measurement]) -> list[str]:
    """In the order in which they had their first turns."""
    return list(dict.fromkeys(m.server for m in measurements))


def rows_of(measurements: Sequence[Measurement]) -> list[str]:
    return list(dict.fromkeys(m.result.row for m in measurements))


def format_ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}x" if theirs else "-"


def _comparison(measurements: Sequence[Measurement], figure: Figure, units: Mapping[str, str]) -> Table:
    """Each row's figure on the first server, then on every other one with the ratio of the two."""
    first, *others = servers_of(measurements)
    table = new_table("row", "unit", first, *(h for other in others for h in (other, "ratio")), words=2)
    figures = medians(measurements, figure)
    for row in rows_of(measurements):
        cells = [f"{figures[first, row]:.1f}"]
        for other in others:
            # A benchmark that was cut short has not measured every row on every server.
            theirs = figures.get((other, row), 0.0)
            cells += [f"{theirs:.1f}", format_ratio(figures[first, row], theirs)]
        table.add_row(row, units[row], *cells)
    return table


def _details(measurements: Sequence[Measurement]) -> Table:
    """A line per row of one server."""
    figures: dict[str, Figure] = {
        "output\ntok/s": lambda m: m.result.output_tokens_per_s,
        "prompt\ntok/s": lambda m: m.result.prompt_tokens_per_s,
        "TTFT\np50 ms": ttft_p50_ms,
        "TTFT\np99 ms": lambda m: m.result.ttft_p99_ms,
        "inter-token\np50 ms": inter_token_p50_ms,
    }
    cpu_headings = ["worker\nCPU s", "other\nCPU s", "control\nplane", "worker\nRSS MiB"]
    table = new_table("row", *figures, *cpu_headings, "short\nanswers")
    for row in rows_of(measurements):
        rounds = [m for m in measurements if m.result.row == row]
        cells = [f"{median(map(figure, rounds)):.1f}" for figure in figures.values()]
        cpu = _cpu_cells([m.cpu for m in rounds if m.cpu is not None])
        table.add_row(row, *cells, *cpu, str(sum(m.result.short_answers for m in rounds)))
    return table


def _server_times(measurements: Sequence[Measurement]) -> Table:
    """A line per row of one server: medians over the rounds of what it tells itself."""
    parts = list(dict.fromkeys(name for m in measurements for name in m.result.server_ms))
    table = new_table("row", *parts)
    for row in rows_of(measurements):
        rounds = [m.result.server_ms for m in measurements if m.result.row == row]
        table.add_row(row, *(f"{median(one.get(part, 0.0) for one in rounds):.1f}" for part in parts))
    return table


def _cpu_cells(uses: Sequence[CpuUse]) -> list[str]:
    shares = [use.control_plane_share for use in uses if use.control_plane_share is not None]
    if not shares:
        return ["-"] * 4
    return [
        f"{median(use.worker_s for use in uses):.2f}",
        f"{median(use.other_s for use in uses):.2f}",
        f"{median(shares):.1%}",
        f"{median(use.worker_rss_mib for use in uses):.0f}",
    ]


def _batching(measurements: Sequence[Measurement]) -> Table:
    """The mixed row: a line per figure, the two policies side by side."""
    first, *others = servers_of(measurements)
    table = new_table(rows_of(measurements)[0], "better", first, *(h for o in others for h in (o, "ratio")), words=2)
    lines: list[tuple[str, str, Figure]] = [
        ("output tok/s", "higher", lambda m: m.result.output_tokens_per_s),
        ("TTFT p50 ms", "lower", ttft_p50_ms),
        ("TTFT p99 ms", "lower", lambda m: m.result.ttft_p99_ms),
        ("inter-token p50 ms", "lower", inter_token_p50_ms),
    ]
    for name, better, figure in lines:
        by_server = {server: value for (server, _), value in medians(measurements, figure).items()}
        cells = [f"{by_server[first]:.1f}"]
        for other in others:
            cells += [f"{by_server[other]:.1f}", format_ratio(by_server[first], by_server[other])]
        table.add_row(name, better, *cells)
    return table
