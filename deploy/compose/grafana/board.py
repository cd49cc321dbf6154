"""How a dashboard of ours looks, and its JSON, built with Grafana's own schema. What is on them is in `boards.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
)

Kind = Literal["lines", "stack", "number"]

_SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
_COLUMNS, _HEIGHT, _NUMBER_HEIGHT = 24, 8, 4


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves over time, or one number. `queries`: a legend and an expression each."""

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]
    says: str
    kind: Kind = "lines"
    # Of a number: from which value on it is red.
    red_from: float | None = None


@dataclass(frozen=True, slots=True)
class Board:
    """A dashboard: rows of panels under a heading each."""

    name: str
    title: str
    rows: Sequence[tuple[str, Sequence[Panel]]]

    @property
    def panels(self) -> list[Panel]:
        return [panel for _, panels in self.rows for panel in panels]


def to_json(board: Board) -> str:
    """What Grafana reads."""
    built = (
        dashboard.Dashboard(f"Headrace: {board.title}")
        .uid(f"headrace-{board.name}")
        .tags(["headrace"])
        .refresh("5s")
        .time("now-15m", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("Headrace").type(DashboardLinkType.DASHBOARDS).tags(["headrace"]).as_dropdown(True)
        )
        .with_variable(_model_variable())
    )
    ids = count(1)
    for heading, panels in board.rows:
        built = built.with_row(dashboard.Row(heading).id(next(ids)))
        for panel in panels:
            drawn = _number(panel) if panel.kind == "number" else _curves(panel)
            built = built.with_panel(drawn.id(next(ids)))
    return JSONEncoder(sort_keys=True, indent=2).encode(built.build()) + "\n"


def _model_variable() -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable("model")
        .label("Model")
        .datasource(_SOURCE)
        .query("label_values(llm_active_requests, model)")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .current(VariableOption(text="All", value="$__all"))
        .include_all(True)
        .all_value(".*")
        .multi(True)
    )


def _targets(panel: Panel) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + number)).datasource(_SOURCE)
        for number, (legend, expression) in enumerate(panel.queries)
    ]


def _curves(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.says)
        .datasource(_SOURCE)
        .unit(panel.unit)
        .min(0)
        .span(_COLUMNS // 3)
        .height(_HEIGHT)
        .line_width(1)
        .fill_opacity(60 if panel.kind == "stack" else 8)
        .legend(
            common.VizLegendOptions()
            .display_mode(looks.LegendDisplayMode.LIST)
            .placement(looks.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI).sort(looks.SortOrder.DESCENDING))
    )
    if panel.kind == "stack":
        built = built.stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL))
    for target in _targets(panel):
        built = built.with_target(target)
    return built


def _number(panel: Panel) -> stat.Panel:
    built = stat.Panel().title(panel.title).description(panel.says).datasource(_SOURCE).unit(panel.unit)
    built = built.span(_COLUMNS // 6).height(_NUMBER_HEIGHT)
    steps = [Threshold(color="green", value=None)]
    if panel.red_from is not None:
        steps.append(Threshold(color="red", value=panel.red_from))
    built = built.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    for target in _targets(panel):
        built = built.with_target(target)
    return built
