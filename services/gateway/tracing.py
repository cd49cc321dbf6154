"""One span per request, when traces are recorded; otherwise the caller's trace context only passes through.

Attributes have the names of OpenTelemetry's conventions for generative AI where those have one.
"""

from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from headrace.v1.sampling_pb2 import FinishReason
from headrace.v1.scheduler_pb2 import Placement
from services.common.errors import HeadraceError
from services.common.tracing import HEADER, traceparent_of, unix_ns
from services.gateway.request import GenerationRequest, Usage
from services.gateway.time_budget import TimeBudget

_PROVIDER = "headrace"
# The phases that pass in this process; the others are spans of the processes they pass in.
_OWN_PHASES = ("admission", "placement", "detokenize")
_FINISH_REASONS = {
    FinishReason.FINISH_REASON_STOP: "stop",
    FinishReason.FINISH_REASON_LENGTH: "length",
}


class RequestSpan:
    """The span of one request, from its arrival to its end."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def traceparent(self) -> str:
        """What makes a span elsewhere a child of this one."""
        return traceparent_of(self._span)

    @property
    def exemplar(self) -> dict[str, str] | None:
        """Labels for what is measured of the request, if its trace is recorded."""
        context = self._span.get_span_context()
        return {"trace_id": trace.format_trace_id(context.trace_id)} if context.trace_flags.sampled else None

    def placed(self, placement: Placement, attempt: int) -> None:
        self._span.add_event("placed", {"worker": placement.worker_id, "attempt": attempt})

    def first_token(self) -> None:
        self._span.add_event("first token")

    def end(
        self,
        usage: Usage,
        outcome: str,
        error: HeadraceError | None,
        finish_reasons: Sequence[FinishReason.ValueType],
        budget: TimeBudget,
    ) -> None:
        span = self._span
        if span.is_recording():
            self._record_phases(budget)
            span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": usage.completion_tokens,
                    "gen_ai.usage.cache_read.input_tokens": usage.cached_prompt_tokens,
                    "gen_ai.response.finish_reasons": [_FINISH_REASONS.get(one, outcome) for one in finish_reasons],
                    "headrace.outcome": outcome,
                    **{f"headrace.{phase}_ms": spent / 1000 for phase, spent in budget.parts.items()},
                }
            )
        if error is not None:
            self._record_error(error)
        span.end()

    def turned_away(self, error: HeadraceError) -> None:
        """It was not even admitted."""
        self._span.set_attribute("headrace.outcome", "refused")
        self._record_error(error)
        self._span.end()

    def _record_error(self, error: HeadraceError) -> None:
        self._span.set_attribute("error.type", type(error).__name__)
        self._span.set_status(trace.StatusCode.ERROR, error.message)

    def _record_phases(self, budget: TimeBudget) -> None:
        context = trace.set_span_in_context(self._span)
        for phase, began, ended in budget.intervals:
            if phase in _OWN_PHASES:
                self._tracer.start_span(phase, context, start_time=unix_ns(began / 1e6)).end(unix_ns(ended / 1e6))


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

    def end(self, *told: object) -> None:
        """Records nothing."""

    def turned_away(self, error: HeadraceError) -> None:
        """Records nothing."""


class Tracing:
    """Opens spans if there is a tracer: a span costs more than a token."""

    def __init__(self, tracer: trace.Tracer | None) -> None:
        self._tracer = tracer

    def begin(self, request: GenerationRequest) -> RequestSpan:
        caller, model = request.caller, request.model.name
        if self._tracer is None:
            return NoSpan(caller.traceparent)
        span = self._tracer.start_span(
            f"{request.operation} {model}",
            TraceContextTextMapPropagator().extract({HEADER: caller.traceparent}),
            trace.SpanKind.SERVER,
            attributes=_attributes(request),
            start_time=unix_ns(caller.arrived),
        )
        return RequestSpan(self._tracer, span)


def _attributes(request: GenerationRequest) -> dict[str, str | int | float]:
    sampling = request.sampling
    attributes: dict[str, str | int | float] = {
        "gen_ai.operation.name": request.operation,
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.request.model": request.model.name,
        "gen_ai.response.model": request.model.name,
        "gen_ai.response.id": request.caller.request_id,
        "gen_ai.request.max_tokens": request.stopping.max_tokens,
        "gen_ai.request.choice.count": request.choices,
        "headrace.request_id": request.caller.internal_id,
    }
    for name in ("seed", "temperature", "top_p", "presence_penalty", "frequency_penalty"):
        if sampling.HasField(name):
            attributes[f"gen_ai.request.{name}"] = getattr(sampling, name)
    return attributes
