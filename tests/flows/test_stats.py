"""How requests went, as an operator asks a stack of two gateways."""

import json
from pathlib import Path

import httpx

from tests.flows.headrace_up import HeadraceUp


def test_stats_are_those_of_all_gateways_together(tmp_path: Path, default_model: Path) -> None:
    stack = HeadraceUp(tmp_path, "--engine", "echo", "--gateways", "2")
    try:
        stack.wait_ready()
        model = stack.fleet().workers[0].registration.model.name
        urls = [str(stack.member(name).metrics_url).removesuffix("/metrics") for name in ("gateway-1", "gateway-2")]
        for url, requests in zip(urls, (1, 2), strict=True):
            for _ in range(requests):
                body = {"model": model, "prompt": "One two three", "max_tokens": 5}
                httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
        assert httpx.get(f"{urls[1]}/v1/stats").json()["windows"][0]["requests"] == 2
        for window in json.loads(stack.run("stats", "--json"))["windows"]:
            assert (window["model"], int(window["requests"]), int(window["tokens"])) == (model, 3, 15)
            assert int(window["end_to_end_s"]["count"]) == 3
            assert 0 < window["time_to_first_token_s"]["p50"] <= window["end_to_end_s"]["p99"]
        assert f"{model}  1m" in stack.run("stats")
    finally:
        stack.kill()
