"""A request is one trace, to which every service adds what it did."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.flows.conftest import WORKER_OPTIONS
from tests.flows.headrace_up import HeadraceUp, eventually
from tests.otlp_collector import OtlpCollector, ReceivedSpan

PROMPT = [random.Random(7).randrange(300, 40_000) for _ in range(600)]
FLAGS = {True: "01", False: "00"}


@pytest.fixture(scope="module")
def collector() -> Iterator[OtlpCollector]:
    running = OtlpCollector()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def traced(
    tmp_path_factory: pytest.TempPathFactory, default_model: Path, collector: OtlpCollector
) -> Iterator[HeadraceUp]:
    """A stack that records the traces of all requests, unless their callers say otherwise."""
    settings = {
        "HEADRACE_OTLP_ENDPOINT": collector.endpoint,
        "HEADRACE_TRACE_SAMPLE": "1",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    running = HeadraceUp(tmp_path_factory.mktemp("traced"), *WORKER_OPTIONS, settings=settings)
    try:
        running.wait_ready()
        yield running
    finally:
        running.kill()


def ask(stack: HeadraceUp, trace_id: str, *, recorded: bool = True) -> None:
    model = stack.fleet().workers[0].registration.model.name
    body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 4, "ignore_eos": True}
    headers = {"traceparent": f"00-{trace_id}-00000000000000ff-{FLAGS[recorded]}"}
    httpx.post(f"{stack.http_url}/v1/completions", json=body, headers=headers, timeout=120).raise_for_status()


def named(spans: list[ReceivedSpan], service: str, name: str) -> ReceivedSpan:
    (span,) = (span for span in spans if (span.service, span.name) == (f"headrace-{service}", name))
    return span


def test_one_trace_has_spans_of_every_service(traced: HeadraceUp, collector: OtlpCollector) -> None:
    ask(traced, "1" * 32)
    eventually(lambda: traced.metric("worker", "headrace_kv_offloaded_blocks_total") > 36, "the cache has the prompt")
    traced.kill_member("worker")
    eventually(lambda: traced.metric("scheduler", "headrace_workers", state="healthy") == 1, "it is back")
    trace_id = "2" * 32
    ask(traced, trace_id)
    spans = collector.wait_for(trace_id, lambda spans: len({span.service for span in spans}) == 4 and len(spans) >= 11)
    (root,) = (span for span in spans if span.parent_id == "00000000000000ff")
    assert root.service == "headrace-gateway" and re.fullmatch(r"text_completion \S+", root.name)
    execute = named(spans, "worker", "execute")
    children = {
        root.id: {
            *((("gateway"), name) for name in ("admission", "placement", "detokenize")),
            *((("scheduler"), name) for name in ("queue", "place")),
            ("worker", "execute"),
        },
        execute.id: {
            *((("worker"), name) for name in ("fetch", "queue", "prefill", "decode")),
            ("cache", "fetch blocks"),
        },
    }
    for parent, expected in children.items():
        found = {(span.service.removeprefix("headrace-"), span.name) for span in spans if span.parent_id == parent}
        assert found == expected
    assert len(spans) == 1 + sum(map(len, children.values())), "no span is without its parent"
    assert named(spans, "scheduler", "place").attributes["headrace.worker"] == "worker"
    assert root.attributes["gen_ai.usage.output_tokens"] == 4
    inside = [span for span in spans if span.parent_id in children]
    assert all(span.began <= span.ended for span in inside)


def test_exemplars_name_the_trace(traced: HeadraceUp) -> None:
    trace_id = "3" * 32
    ask(traced, trace_id)
    page = httpx.get(f"{traced.http_url}/metrics", headers={"accept": "application/openmetrics-text"}).text
    lines = [line for line in page.splitlines() if line.startswith("llm_latency_seconds_bucket") and trace_id in line]
    assert any('phase="total"' in line for line in lines) and any('phase="decode"' in line for line in lines)


def test_a_caller_whose_trace_is_not_recorded_costs_no_span(traced: HeadraceUp, collector: OtlpCollector) -> None:
    ask(traced, "4" * 32, recorded=False)
    ask(traced, "5" * 32)
    collector.wait_for(
        "5" * 32, lambda spans: {"headrace-worker", "headrace-scheduler"} < {one.service for one in spans}
    )
    assert collector.trace("4" * 32) == []
