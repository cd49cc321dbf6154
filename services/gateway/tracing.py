"""One span per request, when traces are recorded; otherwise the caller's trace context only passes through."""

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from headrace.v1.scheduler_pb2 import Placement
from services.common.errors import HeadraceError
from services.gateway.caller import Caller
from services.gateway.request import Usage

_HEADER = "traceparent"


class RequestSpan:
    """The span of one request, from its acceptance to its end."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """What makes a span elsewhere a child of this one."""
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(self._span))
        return carrier.get(_HEADER, "")

    @property
    def exemplar(self) -> dict[str, str] | None:
        """Labels for what is measured of the request, if its trace is recorded."""
        context = self._span.get_span_context()
        return {"trace_id": trace.format_trace_id(context.trace_id)} if context.trace_flags.sampled else None

    def placed(self, placement: Placement, attempt: int) -> None:
        self._span.add_event("placed", {"worker": placement.worker_id, "attempt": attempt})

    def first_token(self) -> None:
        self._span.add_event("first token")

    def end(self, usage: Usage, outcome: str, error: HeadraceError | None) -> None:
        self._span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
        self._span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
        self._span.set_attribute("headrace.cached_prompt_tokens", usage.cached_prompt_tokens)
        self._span.set_attribute("headrace.outcome", outcome)
        if error is not None:
            self._span.set_status(trace.StatusCode.ERROR, error.message)
        self._span.end()


class NoSpan(RequestSpan):
    """Stands in when no traces are recorded; the caller's context is passed on as it came."""

    def __init__(self, traceparent: str) -> None:
        self._traceparent = traceparent

    @property
    def traceparent(self) -> str:
        return self._traceparent

    @property
    def exemplar(self) -> None:
        """Names nothing."""

    def placed(self, placement: Placement, attempt: int) -> None:
        """Records nothing."""

    def first_token(self) -> None:
        """Records nothing."""

    def end(self, usage: Usage, outcome: str, error: HeadraceError | None) -> None:
        """Records nothing."""


class Tracing:
    """Opens spans if there is a tracer: a span costs more than a token."""

    def __init__(self, tracer: trace.Tracer | None) -> None:
        self._tracer = tracer

    def begin(self, caller: Caller, model: str) -> RequestSpan:
        if self._tracer is None:
            return NoSpan(caller.traceparent)
        parent = TraceContextTextMapPropagator().extract({_HEADER: caller.traceparent})
        attributes = {"gen_ai.request.model": model, "headrace.request_id": caller.internal_id}
        return RequestSpan(self._tracer.start_span("generate", parent, trace.SpanKind.SERVER, attributes=attributes))
