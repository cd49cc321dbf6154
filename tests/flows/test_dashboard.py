"""Every series that a dashboard draws is one that the running services show, under the labels that it asks for."""

import json
import re
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.flows.headrace_up import HeadraceUp

DASHBOARDS = sorted((Path(__file__).parents[2] / "deploy/compose/grafana/dashboards").glob("*.json"))
# A name directly before a selector or a label matcher; functions and label lists have none.
SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}")


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_expression_names_series_that_exist(
    dashboard: Path, stack: HeadraceUp, client: openai.OpenAI, model: str
) -> None:
    client.completions.create(model=model, prompt="Once", max_tokens=3)
    shown: dict[str, set[str]] = {}
    for member in ("gateway", "scheduler", "worker", "cache"):
        page = httpx.get(stack.member(member).metrics_url).text
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                shown.setdefault(sample.name, set()).update(sample.labels)
    expressions = [
        target["expr"] for panel in json.loads(dashboard.read_text())["panels"] for target in panel["targets"]
    ]
    assert expressions
    for expression in expressions:
        selectors = SELECTOR.findall(expression)
        assert selectors, expression
        for name, matchers in selectors:
            assert name in shown, f"{name} of {expression}"
            assert set(re.findall(r"(\w+)\s*=~?", matchers)) <= shown[name], expression
