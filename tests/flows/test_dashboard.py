"""Whatever a dashboard, a rule or an alert asks of Prometheus, a stack whose every feature is used has an answer to."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deploy.compose.grafana.draw import draw
from deploy.compose.grafana.reading import FOLDER, ask, queries
from tests.flows.everything import everything_stack
from tests.flows.headrace_up import eventually
from tests.prometheus_server import RULES, PrometheusServer

pytestmark = pytest.mark.timeout(600)

RATE_INTERVAL = "20s"
KEYWORDS = {"and", "or", "unless", "bool"}


def dashboard_expressions() -> list[str]:
    found = [query.filled_in(RATE_INTERVAL) for path in sorted(FOLDER.glob("*.json")) for query in queries(path)]
    return list(dict.fromkeys(found))


def rule_expressions() -> list[str]:
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule["expr"].strip() for group in groups for rule in group["rules"]]


def names(expression: str) -> set[str]:
    """The metrics of an expression: words that are no label, no function and no operator."""
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", expression)
    text = re.sub(r"\b(by|without|ignoring|on|group_left|group_right)\s*\([^)]*\)", " ", text)
    return set(re.findall(r"[a-zA-Z_:][\w:]*\b(?!\s*\()", text)) - KEYWORDS


def whether(expression: str) -> str:
    """An alert's condition as 0 or 1, so that it has a value where it does not hold."""
    return re.sub(r"\{[^}]*\}|([<>]=?|[=!]=)", lambda found: f"{found[1]} bool" if found[1] else found[0], expression)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[PrometheusServer]:
    """One that has watched a stack do everything."""
    with everything_stack(tmp_path_factory.mktemp("everything")) as everything:
        server = PrometheusServer(tmp_path_factory.mktemp("prometheus"), everything.stack)
        try:
            for part in (everything.round, everything.round, everything.kill_workers, everything.round):
                part()
            yield server
        finally:
            server.kill()


def assert_answered(prometheus: PrometheusServer, expression: str) -> None:
    """It has a finite value at some time, at the latest when Prometheus has looked twice more."""
    eventually(lambda: bool(ask(prometheus.url, expression, prometheus.started, time.time(), 1)), expression)


def test_every_expression_of_a_dashboard_has_data(prometheus: PrometheusServer) -> None:
    for expression in dashboard_expressions():
        assert_answered(prometheus, expression)


def test_every_rule_has_data(prometheus: PrometheusServer) -> None:
    for expression in rule_expressions():
        assert_answered(prometheus, whether(expression))


def test_every_metric_that_is_asked_for_exists(prometheus: PrometheusServer) -> None:
    for name in set().union(*(names(expression) for expression in [*dashboard_expressions(), *rule_expressions()])):
        assert_answered(prometheus, name)


def test_no_data_is_made_up() -> None:
    for expression in [*dashboard_expressions(), *rule_expressions()]:
        assert names(expression) and not re.search(r"vector\(|absent|scalar\(", expression), expression


def test_a_dashboard_can_be_drawn_without_grafana(prometheus: PrometheusServer, tmp_path: Path) -> None:
    draw(prometheus.url, FOLDER / "overview.json", tmp_path, prometheus.started, time.time(), RATE_INTERVAL)
    assert (tmp_path / "overview.png").stat().st_size > 10_000


def test_what_is_taken_for_a_name_and_for_a_condition() -> None:
    expression = 'max by (a) (x:y{le="2.5"}) > 5 and ignoring (b) rate(z_total[5m]) >= 0.1'
    assert names(expression) == {"x:y", "z_total"}
    assert whether(expression) == 'max by (a) (x:y{le="2.5"}) > bool 5 and ignoring (b) rate(z_total[5m]) >= bool 0.1'
