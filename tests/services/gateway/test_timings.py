"""Where a request's time went, as its caller and the metrics hear of it: whatever happens, the parts are the whole."""

import asyncio
import json

import httpx
import pytest

from headrace.v1.inference_pb2 import GenerateRequest
from services.gateway.time_budget import PHASES
from tests.services.gateway.fakes import MODEL, FakeWorker, says
from tests.services.gateway.stack import TEXT, Stack, eventually, running_stack

ASKED = {"x-headrace-timings": "1"}
BODY = {"model": MODEL, "prompt": "hello", "max_tokens": 100}
LATENCY = "llm_latency_seconds"


def check(timings: dict[str, float]) -> None:
    """Milliseconds, to the microsecond."""
    assert timings.keys() == {"total_ms", *(f"{phase}_ms" for phase in PHASES)}
    total, *parts = (round(timings[f"{name}_ms"] * 1000) for name in ("total", *PHASES))
    assert sum(parts) == total > 0
    assert min(parts) >= 0


def header_timings(response: httpx.Response) -> dict[str, float]:
    entries = (entry.split(";dur=") for entry in response.headers["x-headrace-timings"].split(", "))
    return {f"{name}_ms": float(duration) for name, duration in entries}


def stream_timings(text: str) -> dict[str, float]:
    *_, last, done = (line.removeprefix("data: ") for line in text.splitlines() if line)
    assert done == "[DONE]"
    timings: dict[str, float] = json.loads(last)["timings"]
    return timings


async def test_callers_get_timings_when_they_ask(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        whole = await stack.http.post("/v1/completions", json=BODY, headers=ASKED)
        check(header_timings(whole))
        assert "x-headrace-timings" not in (await stack.complete()).headers
        for options in ({}, {"stream_options": {"include_usage": True}}):
            body = {**BODY, "stream": True, **options}
            streamed = await stack.http.post("/v1/completions", json=body, headers=ASKED)
            check(stream_timings(streamed.text))
            assert ('"completion_tokens"' in streamed.text) == bool(options)
            assert '"timings"' not in (await stack.http.post("/v1/completions", json=body)).text


async def test_grpc_callers_get_timings_in_the_last_message(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        request = GenerateRequest(model=MODEL, text="hello")
        deltas = [delta async for delta in stack.inference.Generate(request, metadata=tuple(ASKED.items()))]
        assert [delta.HasField("timings") for delta in deltas] == [False] * (len(deltas) - 1) + [True]
        timings = deltas[-1].timings
        assert sum(getattr(timings, f"{phase}_us") for phase in PHASES) == timings.total_us > 0
        assert not any([delta.HasField("timings") async for delta in stack.inference.Generate(request)])


def observed(stack: Stack, suffix: str) -> list[float]:
    return [stack.sample(f"{LATENCY}_{suffix}", model=MODEL, phase=phase) for phase in ("total", *PHASES)]


@pytest.mark.parametrize(
    ("first_worker", "fields"),
    [
        ({}, {}),
        ({}, {"n": 3}),
        ({}, {"stop": "brown fox"}),
        ({"tokens_per_step": 3}, {"max_tokens": 1}),
        ({"break_after": 3}, {}),
        ({"drain_after": 3}, {"n": 2}),
        ({"busy_starts": 1}, {}),
    ],
    ids=["plain", "three choices", "stop string", "one token", "lost worker", "draining worker", "busy worker"],
)
async def test_the_parts_add_up_whatever_happens(
    redis_url: str, first_worker: dict[str, int], fields: dict[str, object]
) -> None:
    workers = [FakeWorker("w0", says(TEXT), **first_worker), FakeWorker("w1", says(TEXT))]  # type: ignore[arg-type]
    async with running_stack(redis_url, workers) as stack:
        stack.scheduler.go.clear()
        asking = asyncio.create_task(stack.http.post("/v1/completions", json=BODY | fields, headers=ASKED))

        async def accepted() -> bool:
            return stack.sample("headrace_leases", state="waiting") == 1

        await eventually(accepted)
        stack.scheduler.go.set()
        timings = header_timings(await asking)
        check(timings)
        assert timings["queue_ms"] > 0, "it waited after it was accepted"
        total, *parts = observed(stack, "sum")
        assert total == pytest.approx(timings["total_ms"] / 1000) and sum(parts) == pytest.approx(total)
        assert observed(stack, "count") == [1] * (1 + len(PHASES))


async def test_scrapers_that_want_openmetrics_get_exemplars_names_unchanged(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        await stack.complete()
        accept = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
        told = await stack.http.get("/metrics", headers={"accept": accept})
        assert told.headers["content-type"].startswith("application/openmetrics-text")
        plain = await stack.http.get("/metrics")
        assert plain.headers["content-type"].startswith("text/plain")

        def names(text: str) -> set[str]:
            lines = (line for line in text.splitlines() if not line.startswith("#") and "_created" not in line)
            return {line.split("{")[0].split(" ")[0] for line in lines}

        assert names(told.text) == names(plain.text)
