"""Draws what the dashboards show of a running Prometheus, one picture each, for where there is no Grafana.

`python -m deploy.compose.grafana.draw http://127.0.0.1:9090 FOLDER --minutes 15`, in the repository's root.
"""

import argparse
import itertools
import math
import re
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from deploy.compose.grafana.reading import FOLDER, Query, Series, ask, queries

_COLUMNS = 3
_POINTS = 200


def draw(url: str, path: Path, out: Path, start: float, end: float, rate_interval: str) -> None:
    """Draws every panel of one dashboard into a PNG."""
    panels = [(title, list(group)) for title, group in itertools.groupby(queries(path), lambda query: query.panel)]
    rows = -(-len(panels) // _COLUMNS)
    figure, axes = pyplot.subplots(rows, _COLUMNS, figsize=(_COLUMNS * 6, rows * 3.2), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    step_s = max(1.0, (end - start) / _POINTS)
    for axis, (title, group) in zip(axes.flat, panels, strict=False):
        found = [
            (_legend(query, series), series)
            for query in group
            for series in ask(url, query.filled_in(rate_interval), start, end, step_s)
        ]
        _panel(axis, title, group[0], found, start, step_s)
    figure.tight_layout()
    figure.savefig(out / f"{path.stem}.png", dpi=70)
    pyplot.close(figure)


def _panel(axis: Axes, title: str, query: Query, found: list[tuple[str, Series]], start: float, step_s: float) -> None:
    """Where there is no sample there is no line."""
    axis.set_title(f"{title} [{query.unit}]", fontsize=10)
    axis.tick_params(labelsize=7)
    if not found:
        axis.text(0.5, 0.5, "no data", ha="center", va="center", transform=axis.transAxes, color="red")
        return

    def step_of(at: float) -> int:
        return round((at - start) / step_s)

    curves = [
        {step_of(at): value for at, value in zip(series.times, series.values, strict=True)} for _, series in found
    ]
    known = set().union(*curves)
    times = range(min(known), max(known) + 1)
    seconds, legends = [at * step_s for at in times], [legend for legend, _ in found]
    if query.stacked:  # without all of its layers there is none
        heights = [[curve.get(at, 0.0 if at in known else math.nan) for at in times] for curve in curves]
        axis.stackplot(seconds, heights, labels=legends)
    else:
        for legend, curve in zip(legends, curves, strict=True):
            axis.plot(seconds, [curve.get(at, math.nan) for at in times], label=legend, linewidth=1)
    whole = sum if query.stacked else max
    top = max(whole(curve.get(at, 0.0) for curve in curves) for at in known)
    axis.set_ylim(0, 1.4 * top or 1.0)  # with room for the legend
    axis.legend(fontsize=6, loc="upper left", ncols=3)


def _legend(query: Query, series: Series) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda label: series.labels.get(label[1], ""), query.legend) or "value"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what the dashboards show of a running Prometheus.")
    parser.add_argument("url", help="of Prometheus")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--rate-interval", default="1m", help="what $__rate_interval stands for")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    end = time.time()
    for path in sorted(FOLDER.glob("*.json")):
        draw(arguments.url, path, arguments.folder, end - arguments.minutes * 60, end, arguments.rate_interval)


if __name__ == "__main__":
    main()
