"""What requests cost, with the real stack: it adds up to the time that the engine was busy, at the worker's price."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.flows.conftest import WORKER_OPTIONS
from tests.flows.headrace_up import HeadraceUp, eventually

PRICE_PER_HOUR = 3600.0  # a second costs 1
PROMPT = "The quick brown fox jumps over the lazy dog. " * 8


@pytest.fixture(scope="module")
def priced(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[HeadraceUp]:
    stack = HeadraceUp(tmp_path_factory.mktemp("costs"), *WORKER_OPTIONS, "--price-per-hour", str(PRICE_PER_HOUR))
    try:
        stack.wait_ready()
        yield stack
    finally:
        stack.kill()


def test_costs_add_up_to_the_busy_seconds_at_the_price(priced: HeadraceUp) -> None:
    keys = {name: json.loads(priced.run("keys", "create", name, "--json")) for name in ("one", "other")}
    model = priced.fleet().workers[0].registration.model.name

    def complete(key: str, **fields: Any) -> dict[str, Any]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **fields}
        headers = {"authorization": f"Bearer {keys[key]['key']}"}
        answer = httpx.post(f"{priced.http_url}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        usage: dict[str, Any] = answer.json()["usage"]
        return usage

    first = complete("one")
    hit = complete("one")
    three = complete("other", n=3, temperature=1)
    stopped = complete("other", stop="o", max_tokens=64)
    told = [usage["cost"] for usage in (first, hit, three, stopped)]
    assert hit["prompt_tokens_details"]["cached_tokens"] > 0
    assert 0 < hit["cost"] < first["cost"]
    _cancel_in_the_middle(priced, keys["other"]["key"], model)

    busy_s = _settled_seconds(priced, requests=5)
    rows = {row["key"]: row for row in json.loads(priced.run("costs", "--by", "key", "--json"))}
    one, other = rows[keys["one"]["id"]], rows[keys["other"]["id"]]
    assert (one["requests"], other["requests"]) == (2, 3)
    assert one["cost"] == pytest.approx(told[0] + told[1])
    assert other["cost"] > told[2] + told[3]  # the cancelled one is in it
    assert one["cost"] + other["cost"] == pytest.approx(busy_s * PRICE_PER_HOUR / 3600, abs=1e-6)
    assert one["saved_by_prefix"] > 0
    counted = priced.metric("gateway", "headrace_cost_total", model=model)
    assert counted == pytest.approx(one["cost"] + other["cost"])
    shown = priced.run("costs", "--by", "key", "--since", "1d")
    assert keys["one"]["id"] in shown and "one" in shown


def _cancel_in_the_middle(stack: HeadraceUp, key: str, model: str) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    headers = {"authorization": f"Bearer {key}"}
    with httpx.stream("POST", f"{stack.http_url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert next(lines).startswith("data: ")


def _settled_seconds(stack: HeadraceUp, requests: int) -> float:
    """How long the engine was busy, once all has been told and written."""

    def written() -> bool:
        rows = json.loads(stack.run("costs", "--json"))
        return sum(row["requests"] for row in rows) == requests

    eventually(written, "all requests are in Redis")
    return sum(stack.metric("worker", "headrace_worker_seconds_total", use=use) for use in ("prefill", "decode"))
