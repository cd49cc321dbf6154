"""Where the deltas of an answer go: into a stream of events, or into one body; past whoever reads the answer, too."""

from services.gateway.http.exchange import HttpExchange
from services.gateway.http.openai_events import CompletionEvents
from services.gateway.request import Delta


class EventStream:
    """Sends the deltas of one answer as server-sent events."""

    def __init__(self, exchange: HttpExchange) -> None:
        self._exchange = exchange
        self._events: CompletionEvents | None = None

    def begin(self, events: CompletionEvents) -> None:
        """To be called before the first delta."""
        self._events = events

    @property
    def open(self) -> bool:
        return self._exchange.open

    def write(self, delta: Delta) -> None:
        if event := self._event(delta):
            self._exchange.write_event(event)

    async def send(self, delta: Delta) -> None:
        """Sends one, and waits while the client does not read."""
        if not (event := self._event(delta)):
            return
        if self._exchange.open:
            self._exchange.write_event(event)
        else:
            await self._exchange.send_event(event)

    def _event(self, delta: Delta) -> bytes:
        """Empty where its text is held back, unless it has log-probabilities, or is the first one of a choice."""
        assert self._events is not None, "the answer has begun"
        if delta.text or delta.finish_reason or not delta.seq or delta.logprobs is not None:
            return self._events.event(delta)
        return b""


class Collected:
    """Puts the deltas of each choice together."""

    open = True

    def __init__(self) -> None:
        self._wholes: dict[int, Delta] = {}
        self._with_logprobs: dict[int, list[Delta]] = {}

    def write(self, delta: Delta) -> None:
        whole = self._wholes.setdefault(delta.choice, delta)
        if whole is not delta:
            whole.text += delta.text
            whole.finish_reason = delta.finish_reason
        if delta.logprobs is not None:
            self._with_logprobs.setdefault(delta.choice, []).append(delta)

    def choices(self) -> list[tuple[Delta, list[Delta]]]:
        """Of each choice, in order: its whole text, and the deltas that have log-probabilities."""
        return [(self._wholes[index], self._with_logprobs.get(index, [])) for index in sorted(self._wholes)]
