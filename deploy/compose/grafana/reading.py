"""Reads the dashboards' JSON, and asks a Prometheus what their panels ask it."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

FOLDER = Path(__file__).parent / "dashboards"


@dataclass(frozen=True, slots=True)
class Query:
    """One expression of a panel, with Grafana's variables in it."""

    board: str
    panel: str
    unit: str
    stacked: bool
    legend: str
    expression: str

    def filled_in(self, rate_interval: str) -> str:
        """As Grafana asks it with all models chosen."""
        return self.expression.replace("$__rate_interval", rate_interval).replace("$model", ".*")


def queries(path: Path) -> Iterator[Query]:
    """Of one dashboard's file, in the order of its panels."""
    board = json.loads(path.read_text())
    for panel in board["panels"]:
        defaults = panel.get("fieldConfig", {}).get("defaults", {})
        stacked = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
        for target in panel.get("targets", []):
            yield Query(
                board["title"],
                panel["title"],
                defaults.get("unit", ""),
                stacked,
                target.get("legendFormat", ""),
                target["expr"],
            )


@dataclass(frozen=True, slots=True)
class Series:
    """Finite samples of one series: times in Unix seconds, and values."""

    labels: dict[str, str]
    times: list[float]
    values: list[float]


def ask(url: str, expression: str, start: float, end: float, step_s: float) -> list[Series]:
    """The series of an expression between two times that have samples. Raises httpx.HTTPError, also for a bad one."""
    asked: dict[str, Any] = {"query": expression, "start": start, "end": end, "step": step_s}
    answer = httpx.post(f"{url}/api/v1/query_range", data=asked, timeout=60)
    answer.raise_for_status()
    found = []
    for one in answer.json()["data"]["result"]:
        samples = [(float(at), float(value)) for at, value in one["values"] if math.isfinite(float(value))]
        if samples:
            found.append(Series(one["metric"], [at for at, _ in samples], [value for _, value in samples]))
    return found
