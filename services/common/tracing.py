"""Spans of one trace that runs through all services: its context travels in jobs, messages and gRPC metadata.

Whether a trace is recorded is decided once, where it begins (`telemetry.set_up`); everybody else goes by the flag in
the context, so a request that is not traced costs a look at one character.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grpc.aio
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.common.config import CommonSettings

HEADER = "traceparent"
"""Of the W3C, in HTTP headers and gRPC metadata."""

Attributes = Mapping[str, str | int | float | bool]


class Tracer:
    """Makes spans of those requests whose trace is recorded."""

    def __init__(self, tracer: trace.Tracer | None = None) -> None:
        """Without a tracer nothing is recorded here."""
        self._tracer = tracer

    def begin(self, name: str, traceparent: str, attributes: Attributes) -> trace.Span | None:
        """A span that began now, as a child of that context; None if its trace is not recorded."""
        if self._tracer is None or not is_recorded(traceparent):
            return None
        parent = TraceContextTextMapPropagator().extract({HEADER: traceparent})
        return self._tracer.start_span(name, parent, trace.SpanKind.SERVER, attributes=attributes)

    def record(
        self, name: str, parent: trace.Span | str, began: float, ended: float, attributes: Attributes | None = None
    ) -> None:
        """A span of the past, between two instants of the monotonic clock in seconds. Its parent is given as a span or
        as a context; nothing is recorded if the context is of no recorded trace.
        """
        if self._tracer is None or (isinstance(parent, str) and not is_recorded(parent)):
            return
        if isinstance(parent, str):
            context = TraceContextTextMapPropagator().extract({HEADER: parent})
        else:
            context = trace.set_span_in_context(parent)
        span = self._tracer.start_span(name, context, attributes=attributes, start_time=unix_ns(began))
        span.end(unix_ns(ended))

    @contextlib.contextmanager
    def serving(self, name: str, context: "grpc.aio.ServicerContext[Any, Any]") -> Iterator[None]:
        """The span of a call, if its caller's trace is recorded."""
        traceparent = next((str(value) for key, value in context.invocation_metadata() or () if key == HEADER), "")
        span = self.begin(name, traceparent, {})
        try:
            yield
        finally:
            if span is not None:
                span.end()


def make_tracer(service: str, settings: CommonSettings) -> Tracer:
    """This process's, after `telemetry.set_up`."""
    return Tracer(trace.get_tracer(f"headrace.{service}") if settings.otlp_endpoint else None)


def is_recorded(traceparent: str) -> bool:
    """Whether a context, `VERSION-TRACE-PARENT-FLAGS`, is of a trace that is recorded: the lowest bit of its flags."""
    return traceparent[-1:] in tuple("13579bdf")


def traceparent_of(span: trace.Span) -> str:
    """The context that makes a span elsewhere a child of this one."""
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(span))
    return carrier.get(HEADER, "")


def unix_ns(instant: float) -> int:
    """An instant of the monotonic clock as nanoseconds since 1970."""
    return time.time_ns() - time.monotonic_ns() + int(instant * 1e9)
