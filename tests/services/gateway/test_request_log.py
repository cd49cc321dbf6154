"""The one line that each request leaves in the log."""

import logging
from typing import Any

import pytest

from tests.services.gateway.fakes import MODEL, FakeWorker, says
from tests.services.gateway.stack import TEXT, running_stack

LOGGER = "services.gateway.request_log"


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if hasattr(record, "fields")]


async def test_a_request_that_was_resumed(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    workers = [FakeWorker("w0", says(TEXT), break_after=2), FakeWorker("w1", says(TEXT))]
    with caplog.at_level(logging.INFO, LOGGER):
        async with running_stack(redis_url, workers) as stack:
            body = {"model": MODEL, "prompt": "a secret", "max_tokens": 100}
            trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
            headers = {"x-request-id": "mine", "traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
            usage = (await stack.http.post("/v1/completions", json=body, headers=headers)).json()["usage"]
    (line,) = lines(caplog)
    assert line.pop("internal_id").startswith("mine.")
    times = [line.pop(name) for name in ("queue_ms", "ttft_ms", "total_ms")]
    assert 0 < times[0] <= times[1] <= times[2]
    assert line == {
        "outcome": "success",
        "request_id": "mine",
        "trace_id": trace_id,
        "model": MODEL,
        "priority": "normal",
        "prompt_tokens": usage["prompt_tokens"],
        "cached_prompt_tokens": 0,
        "completion_tokens": usage["completion_tokens"],
        "finish": "stop",
        "attempts": 2,
        "worker": "w1",
    }
    assert "a secret" not in caplog.text and TEXT not in caplog.text


async def test_a_request_that_failed_in_the_queue(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        async with running_stack(redis_url) as stack:
            stack.scheduler.go.clear()
            await stack.http.post(
                "/v1/completions", json={"model": MODEL, "prompt": "hello"}, headers={"x-request-timeout-ms": "50"}
            )
    (line,) = lines(caplog)
    assert line["outcome"] == "error" and "0.05 seconds" in line["error"]
    assert not line.keys() & {"worker", "queue_ms", "ttft_ms", "finish", "key", "trace_id"}


async def test_texts_are_written_only_when_asked_for(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        async with running_stack(redis_url, log_texts=True) as stack:
            await stack.complete("hello world")
    assert "prompts and answers are written" in caplog.text
    (line,) = lines(caplog)
    assert line["prompt"] == "hello world" and line["answers"][0].startswith(TEXT)


async def test_nothing_is_made_of_it_where_the_level_is_higher(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, LOGGER):
        async with running_stack(redis_url) as stack:
            await stack.complete()
    assert not lines(caplog)
