"""What a sequence did on this worker, as spans of its request's trace."""

from opentelemetry import trace

from services.common.tracing import Tracer
from services.worker.run_times import RunTimes


class RunTraces:
    """Opens a span per sequence whose trace is recorded, and closes it with its phases as children."""

    def __init__(self, tracer: Tracer, model_name: str) -> None:
        self._tracer = tracer
        self._model_name = model_name

    def begin(self, traceparent: str, request_id: str, attempt: int, choice: int) -> trace.Span | None:
        attributes: dict[str, str | int] = {
            "gen_ai.request.model": self._model_name,
            "headrace.request_id": request_id,
            "headrace.attempt": attempt,
            "headrace.choice": choice,
        }
        return self._tracer.begin("execute", traceparent, attributes)

    def end(self, span: trace.Span, times: RunTimes) -> None:
        """Its phases as far as it came; the one that it ended in is as long as it took until then."""
        marks = {
            "fetch": (times.arrived, times.gathered),
            "queue": (times.gathered, times.admitted or times.ended),
            "prefill": (times.admitted, times.begun or times.ended),
            "decode": (times.begun, times.ended),
        }
        for phase, (began, ended) in marks.items():
            if 0.0 < began < ended:
                self._tracer.record(phase, span, began, ended)
        span.end()
