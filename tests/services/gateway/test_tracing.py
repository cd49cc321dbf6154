from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace.v1.scheduler_pb2 import Placement
from services.common.errors import Unavailable
from services.gateway.caller import Caller
from services.gateway.request import Usage
from services.gateway.tracing import Tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_span_continues_the_callers_trace_and_is_passed_on() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    span = Tracing(provider.get_tracer("test")).begin(Caller("r1", "r1.5", 0.0, 1.0, PARENT), "m")
    assert span.traceparent.split("-")[1] == PARENT.split("-")[1]
    assert span.traceparent != PARENT
    span.placed(Placement(worker_id="w"), 1)
    span.first_token()
    span.end(Usage(5, 7, 0), "error", Unavailable("gone"))
    (ended,) = exporter.get_finished_spans()
    attributes = ended.attributes or {}
    assert attributes["headrace.request_id"] == "r1.5"
    assert attributes["gen_ai.usage.output_tokens"] == 7
    assert [event.name for event in ended.events] == ["placed", "first token"]
    assert ended.status.description == "gone"


def test_without_a_tracer_the_context_passes_through() -> None:
    span = Tracing(None).begin(Caller("r1", "r1.5", 0.0, 1.0, PARENT), "m")
    assert span.traceparent == PARENT
    span.end(Usage(0, 0, 0), "success", None)
