"""What an operator sees of a running stack: request ids, metrics, health, `headrace ps`, cached tokens."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import httpx
import openai
import pytest

from tests.flows.headrace_up import HEADRACE, HeadraceUp, eventually

EXPECTED_METRICS = {
    "gateway": {"llm_requests_total", "llm_tokens_generated_total", "llm_active_requests", "llm_latency_seconds_count"},
    "scheduler": {"headrace_queue_depth", "headrace_placements_total", "headrace_workers"},
    "cache": {"headrace_cache_blocks", "headrace_cache_holders", "headrace_cache_watchers"},
    "worker": {"vllm:generation_tokens_total", "vllm:kv_cache_usage_perc", "headrace_engine_step_seconds_count"},
}


def test_a_request_id_is_echoed_or_given(http: httpx.Client, model: str) -> None:
    body = {"model": model, "prompt": "Hello", "max_tokens": 1}
    own = http.post("/v1/completions", json=body, headers={"x-request-id": "my-own-id"})
    assert own.headers["x-request-id"] == "my-own-id"
    given = {http.post("/v1/completions", json=body).headers["x-request-id"] for _ in range(2)}
    assert len(given) == 2
    refused = http.post("/v1/completions", json={**body, "n": 0}, headers={"x-request-id": "my-own-id"})
    assert refused.headers["x-request-id"] == "my-own-id"


@pytest.mark.parametrize("name", ["gateway", "scheduler", "cache", "worker"])
def test_every_service_shows_its_metrics(http: httpx.Client, stack: HeadraceUp, model: str, name: str) -> None:
    http.post("/v1/completions", json={"model": model, "prompt": "Hello", "max_tokens": 2}).raise_for_status()
    url = stack.member(name).metrics_url
    assert url is not None
    shown = {line.split("{")[0].split(" ")[0] for line in httpx.get(url).text.splitlines() if line[:1] != "#"}
    assert EXPECTED_METRICS[name] <= shown


def test_liveness_and_readiness(http: httpx.Client) -> None:
    assert [http.get(path).status_code for path in ("/health/live", "/health/ready")] == [200, 200]


def test_a_repeated_long_prompt_is_found_in_the_cache(client: openai.OpenAI, model: str) -> None:
    prompt = list(range(1000, 1200))

    def cached_tokens(**fields: object) -> int:
        answer = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=4, extra_body=fields)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached_tokens() == 0
    assert cached_tokens() == 192  # all full blocks of 16 that end before the last prompt token
    assert cached_tokens(cache_salt="another tenant") == 0


def test_ps_shows_every_process(stack: HeadraceUp, model: str) -> None:
    shown = subprocess.run(
        (*HEADRACE, "ps"), env={**stack.environment, "COLUMNS": "200"}, capture_output=True, text=True, check=True
    ).stdout
    rows = {row.split()[1]: row for row in shown.splitlines() if len(row.split()) > 5}
    for process in stack.state.processes:
        row = rows[process.name]
        assert str(process.pid) in row
        assert process.address in row
        assert "serving" in row and "not serving" not in row
        assert "MiB" in row
    assert model in rows["worker"]
    assert stack.http_url in shown


def test_levels_change_while_every_service_runs(stack: HeadraceUp, http: httpx.Client, model: str) -> None:
    def requests_logged() -> int:
        return Path(stack.member("gateway").log).read_text().count("completion_tokens=1 ")

    def complete() -> None:
        http.post("/v1/completions", json={"model": model, "prompt": "Hello", "max_tokens": 1}).raise_for_status()

    def level_of(name: str) -> str:
        return re.findall(r"log level (\w+),", Path(stack.member(name).log).read_text())[-1]

    services = ["cache", "scheduler", "worker", "gateway"]
    try:
        for level, lines in (("warning", 0), ("info", 1)):
            assert stack.run("log-level", "all", level).strip() == f"{', '.join(services)}: log level {level}"
            eventually(lambda level=level: [level_of(name) for name in services] == [level] * 4, "all have changed")  # type: ignore[misc]
            before = requests_logged()
            complete()
            eventually(lambda expected=before + lines: requests_logged() == expected, "the line is there")  # type: ignore[misc]
    finally:
        stack.run("log-level", "all", "info")


def test_the_printed_curl_line_is_answered_with_paris(stack: HeadraceUp) -> None:
    (line,) = [line.strip() for line in stack.output.splitlines() if line.strip().startswith("curl ")]
    _curl, _unbuffered, url, _header, content_type, _data, body = shlex.split(line)
    name, _, value = content_type.partition(": ")
    answer = httpx.post(url, content=body, headers={name: value}, timeout=60)
    events = [json.loads(event) for event in re.findall(r"^data: (\{.*\})$", answer.text, re.MULTILINE)]
    assert "Paris" in "".join(event["choices"][0]["delta"].get("content", "") for event in events)
