from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace.v1.sampling_pb2 import FinishReason, Sampling, Stopping
from headrace.v1.scheduler_pb2 import Placement
from services.common.errors import Unavailable
from services.gateway.caller import Caller
from services.gateway.catalog import Model
from services.gateway.request import GenerationRequest, Usage
from services.gateway.time_budget import TimeBudget, now_us
from services.gateway.tracing import Tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STOP = FinishReason.FINISH_REASON_STOP


class NamedModel(Model):
    def __init__(self) -> None:
        object.__setattr__(self, "name", "m")


def request() -> GenerationRequest:
    caller = Caller("r1", "r1.5", now_us() / 1e6, 1.0, PARENT)
    return GenerationRequest(
        caller, NamedModel(), [1, 2], Sampling(temperature=0.5), Stopping(max_tokens=9), operation="chat"
    )


def test_a_span_continues_the_callers_trace_and_is_passed_on() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    span = Tracing(provider.get_tracer("test")).begin(request())
    assert span.traceparent.split("-")[1] == PARENT.split("-")[1]
    assert span.traceparent != PARENT
    assert span.exemplar == {"trace_id": PARENT.split("-")[1]}
    span.placed(Placement(worker_id="w"), 1)
    span.first_token()
    budget = TimeBudget(now_us() - 1000)
    budget.spend("admission", now_us() - 400)
    budget.spend("decode", now_us())
    span.end(Usage(5, 7, 0), "error", Unavailable("gone"), [STOP], budget)
    phase, ended = exporter.get_finished_spans()
    assert phase.name == "admission" and phase.parent is not None and ended.context is not None
    assert phase.parent.span_id == ended.context.span_id
    attributes = ended.attributes or {}
    assert ended.name == "chat m"
    assert attributes["headrace.request_id"] == "r1.5"
    assert attributes["gen_ai.request.temperature"] == 0.5 and "gen_ai.request.top_p" not in attributes
    assert attributes["gen_ai.usage.output_tokens"] == 7
    assert attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert [event.name for event in ended.events] == ["placed", "first token"]
    assert ended.status.description == "gone"


def test_a_request_that_is_not_admitted_leaves_a_span() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    Tracing(provider.get_tracer("test")).begin(request()).turned_away(Unavailable("shutting down"))
    (ended,) = exporter.get_finished_spans()
    assert (ended.attributes or {})["headrace.outcome"] == "refused"
    assert ended.status.description == "shutting down"


def test_without_a_tracer_the_context_passes_through() -> None:
    span = Tracing(None).begin(request())
    assert span.traceparent == PARENT and span.exemplar is None
    span.end(Usage(0, 0, 0), "success", None, [STOP], TimeBudget(0))
