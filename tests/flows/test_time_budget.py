"""The time budget of requests to a real stack: exact, and what is left for the network is little."""

import statistics

import httpx

from services.gateway.time_budget import PHASES
from tests.flows.headrace_up import HeadraceUp

REQUESTS = 40


def timings_of(http: httpx.Client, model: str, number: int) -> dict[str, float]:
    body = {"model": model, "prompt": f"Number {number} is", "max_tokens": 8, "ignore_eos": True}
    answer = http.post("/v1/completions", json=body, headers={"x-headrace-timings": "1"})
    entries = (entry.split(";dur=") for entry in answer.headers["x-headrace-timings"].split(", "))
    return {name: float(duration) for name, duration in entries}


def test_parts_add_up_and_the_network_is_little_of_it(stack: HeadraceUp, http: httpx.Client, model: str) -> None:
    """With `-s` it prints the medians: docs/observability.md has them. What is asserted of the network is what would be
    wrong on any machine: that it is where most of the time goes.
    """
    budgets = [timings_of(http, model, number) for number in range(REQUESTS)]
    for budget in budgets:
        parts = [round(budget[phase] * 1000) for phase in PHASES]
        assert sum(parts) == round(budget["total"] * 1000)
        assert min(parts) >= 0
    medians = {name: statistics.median(budget[name] for budget in budgets) for name in ("total", *PHASES)}
    print("\n" + ", ".join(f"{name} {median:.3f} ms" for name, median in medians.items()))
    assert medians["prefill"] > 0 and medians["decode"] > 0
    assert medians["network"] < medians["total"] / 2
