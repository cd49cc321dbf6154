import time

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.common.tracing import Tracer, is_recorded, traceparent_of

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"


@pytest.mark.parametrize(
    ("traceparent", "recorded"),
    [(PARENT + "01", True), (PARENT + "03", True), (PARENT + "0b", True), (PARENT + "00", False), ("", False)],
)
def test_the_flag_says_whether_a_trace_is_recorded(traceparent: str, recorded: bool) -> None:
    assert is_recorded(traceparent) == recorded


def test_spans_are_children_of_the_context_and_of_one_another() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer, now = Tracer(provider.get_tracer("test")), time.monotonic()
    span = tracer.begin("whole", PARENT + "01", {"a": 1})
    assert span is not None and traceparent_of(span).startswith(PARENT[:36])
    tracer.record("part", span, now - 0.5, now - 0.25)
    tracer.record("other part", PARENT + "01", now - 0.25, now)
    tracer.record("of no recorded trace", PARENT + "00", now - 0.25, now)
    assert tracer.begin("of no recorded trace", PARENT + "00", {}) is None
    span.end()
    part, other, whole = exporter.get_finished_spans()
    assert whole.context is not None and part.parent is not None and part.parent.span_id == whole.context.span_id
    assert other.parent is not None and whole.parent is not None
    assert f"{other.parent.span_id:016x}" == f"{whole.parent.span_id:016x}" == PARENT.split("-")[2]
    assert part.end_time is not None and part.start_time is not None
    assert abs(part.end_time - part.start_time - 250_000_000) < 100_000, "the clocks are read twice"
    assert abs(time.time_ns() - part.end_time) < 60e9


def test_without_a_tracer_nothing_is_recorded() -> None:
    tracer = Tracer()
    assert tracer.begin("whole", PARENT + "01", {}) is None
    tracer.record("part", PARENT + "01", 0.0, 1.0)
