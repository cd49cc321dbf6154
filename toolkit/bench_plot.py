"""A picture of a benchmark: grouped bars per row, rates on the left, time to the first token on the right."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.bench_record import Measurement, Record
from toolkit.bench_report import Figure, medians, rate_of, rows_of, servers_of, ttft_p50_ms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR_IN = 0.26  # height of a bar, in inches
_GROUP_GAP_IN = 0.22
_PANEL_IN = 1.3  # what a panel needs beside its bars
_WIDTH_IN = 12.0
_DOTS_PER_INCH = 130
# Told apart by people with color-blindness too (Okabe and Ito).
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def plot(record: Record, path: Path) -> None:
    """Writes a PNG; makes the folder if it is not there. The record has at least one measurement."""
    from matplotlib.figure import Figure as Picture  # here: slow to import, and only a benchmark needs it

    groups = [group for group in (record.measurements, record.batching) if group]
    heights = [_panel_height_in(group) for group in groups]
    picture = Picture(figsize=(_WIDTH_IN, sum(heights) + 0.4), layout="constrained")
    picture.suptitle(f"{record.facts.cpu}, {record.facts.cores} cores; medians, rounds: {record.rounds}", fontsize=10)
    panels = picture.subplots(len(groups), 2, squeeze=False, height_ratios=heights)
    for group, (left, right) in zip(groups, panels, strict=True):
        _draw_bars(left, group, rate_of(record.rows))
        left.set_xlabel("tokens/s (output; in the row prefill, prompt), higher is better")
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=9)
        _draw_bars(right, group, ttft_p50_ms)
        _scale_by_decades(right, list(medians(group, ttft_p50_ms).values()))
        right.set_xlabel("time to the first token, p50, ms (log), lower is better")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=_DOTS_PER_INCH, format="png")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _scale_by_decades(axes: "Axes", values: Sequence[float]) -> None:
    """A logarithmic axis from the decade below the values, with a label for each decade alone."""
    axes.set_xscale("log")
    axes.set_xlim(10 ** math.floor(math.log10(min(values) * 0.8)), max(values) * 2)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter("")


def _panel_height_in(measurements: Sequence[Measurement]) -> float:
    bars = len(servers_of(measurements))
    return _PANEL_IN + len(rows_of(measurements)) * (bars * _BAR_IN + _GROUP_GAP_IN)


def _draw_bars(axes: "Axes", measurements: Sequence[Measurement], figure: Figure) -> None:
    """A group of bars per row from top to bottom, in it a bar per server, each with its figure at its end."""
    servers, rows = servers_of(measurements), rows_of(measurements)
    figures = medians(measurements, figure)
    group = len(servers) * _BAR_IN + _GROUP_GAP_IN
    for index, server in enumerate(servers):
        measured = [row for row in rows if (server, row) in figures]
        heights = [rows.index(row) * group + index * _BAR_IN for row in measured]
        values = [figures[server, row] for row in measured]
        bars = axes.barh(heights, values, _BAR_IN * 0.9, label=server, color=_COLORS[index % len(_COLORS)])
        axes.bar_label(bars, [_figure(value) for value in values], padding=3, fontsize=8)
    middle = (len(servers) - 1) * _BAR_IN / 2
    axes.set_yticks([index * group + middle for index in range(len(rows))], rows)
    axes.invert_yaxis()
    axes.margins(x=0.12)  # room for the figures
    axes.spines[["top", "right"]].set_visible(False)
