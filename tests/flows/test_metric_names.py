"""docs/observability.md names every metric that the running services show, and no other."""

import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.flows.headrace_up import HeadraceUp

PAGE = Path(__file__).parents[2] / "docs/observability.md"
SECTION = re.compile(r"^### The (\w+)$(.*?)(?=^#|\Z)", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| `([a-zA-Z0-9_:]+)` \| (\w+) \|", re.MULTILINE)
# What the client library adds by itself; `_created` are the times at which counters and histograms began.
FOREIGN = ("python_", "process_")


def described(service: str) -> set[tuple[str, str]]:
    """Names and types in the service's table."""
    sections = dict(SECTION.findall(PAGE.read_text(encoding="utf-8")))
    return set(ROW.findall(sections[service]))


def shown(stack: HeadraceUp, service: str) -> dict[tuple[str, str], Metric]:
    page = httpx.get(str(stack.member(service).metrics_url), timeout=10).text
    families = text_string_to_metric_families(page)
    return {
        (family.name + ("_total" if family.type == "counter" else ""), family.type): family
        for family in families
        if not family.name.startswith(FOREIGN) and not family.name.endswith("_created")
    }


@pytest.mark.parametrize("service", ["gateway", "scheduler", "worker", "cache"])
def test_the_page_names_every_metric_with_its_type(stack: HeadraceUp, service: str) -> None:
    expected, found = shown(stack, service), described(service)
    missing = [f"| `{name}` | {kind} | LABELS | UNIT | {expected[name, kind].documentation} |"
               for name, kind in sorted(expected.keys() - found)]  # fmt: skip
    assert not missing, f"add to the table of the {service} in {PAGE.name}:\n" + "\n".join(missing)
    assert not found - expected.keys(), f"{PAGE.name} has what the {service} does not show"
