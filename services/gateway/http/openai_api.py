"""POST /v1/completions and /v1/chat/completions: raw ASGI, since every token passes here."""

import contextlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from services.common.errors import InvalidRequest
from services.gateway.answers.answers import Answer, Answers
from services.gateway.answers.recording import recording
from services.gateway.caller import Caller
from services.gateway.direct import Outlet
from services.gateway.http.exchange import HttpExchange
from services.gateway.http.json_bodies import parse
from services.gateway.http.openai_events import DONE, FINISH_REASONS, ChatEvents, CompletionEvents, usage_object
from services.gateway.http.openai_logprobs import chat_logprobs, completion_logprobs
from services.gateway.http.openai_requests import RequestReader
from services.gateway.http.openai_types import (
    AnswerMessage,
    ChatBody,
    ChatChoice,
    CommonBody,
    CompletionBody,
    CompletionChoice,
    CompletionResponse,
)
from services.gateway.http.outlets import Collected, EventStream
from services.gateway.http.post_route import JSON, PostRoute
from services.gateway.request import Delta, GenerationRequest, Usage
from services.gateway.time_budget import TimeBudget
from services.gateway.timings import HEADER, timings_header

B = TypeVar("B", bound=CommonBody)


@dataclass(frozen=True, slots=True)
class Kind(Generic[B]):
    """What makes one of the two APIs."""

    id_prefix: str
    object_name: str
    decoder: "msgspec.json.Decoder[B]"
    read: Callable[[B, Caller], Awaitable[list[GenerationRequest]]]
    events: type[CompletionEvents]
    choice: Callable[[Delta, list[Delta]], CompletionChoice | ChatChoice]
    """A choice from its whole text and from those of its deltas that have log-probabilities."""


class CompletionRoute(PostRoute, Generic[B]):
    """The ASGI application of one of the two routes."""

    def __init__(self, kind: Kind[B], answers: Answers, *shared: Any) -> None:
        """`shared`: what `PostRoute` takes."""
        super().__init__(*shared)
        self._kind = kind
        self._answers = answers

    async def handle(self, exchange: HttpExchange) -> None:
        settings = self.settings
        with self.admission.entering():  # before the body takes up memory
            exchange.account = await self.callers.identify(exchange.headers, "generate")
            caller = exchange.caller(settings.default_timeout_s)
            content = await exchange.read_body(settings.max_body_bytes, settings.read_timeout_s)
            body = parse(content, self._kind.decoder)
            if body.resumable and not body.stream:
                raise InvalidRequest("resumable needs stream to be true.", field="resumable")
            outlet = EventStream(exchange) if body.stream else Collected()
            answer = await self._answer(exchange, body, caller, content, outlet)
        await exchange.while_connected(
            self._stream(exchange, body, answer, outlet)
            if isinstance(outlet, EventStream)
            else self._respond(exchange, answer, outlet)
        )

    async def _answer(self, exchange: HttpExchange, body: B, caller: Caller, content: bytes, outlet: Outlet) -> Answer:
        """A new answer; or one that the caller comes back for, then whatever else the body says."""
        if (last_event := exchange.header(b"last-event-id")) is not None:
            if not body.stream:
                raise InvalidRequest("Last-Event-ID needs stream to be true.", field="stream")
            answer_id, position = _parse_event_id(last_event)
            return await self._answers.resume(answer_id, position + 1, caller.key_id)
        requests = await self._kind.read(body, caller)
        named = self.path.encode() + b"\0" + content
        key = exchange.header(b"idempotency-key")
        return await self._answers.begin(
            requests, recording(caller, named, resumable=bool(body.resumable), idempotency_key=key), outlet
        )

    async def _stream(self, exchange: HttpExchange, body: B, answer: Answer, stream: EventStream) -> None:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        response_id = self._kind.id_prefix + answer.request_id
        events = self._kind.events(
            response_id,
            answer.model,
            answer.accepted_unix_s,
            with_usage=with_usage,
            answer_id=answer.id,
            system_fingerprint=answer.system_fingerprint,
        )
        stream.begin(events)
        usage, timings = Usage(0, 0, 0), None
        async with contextlib.aclosing(answer.deltas) as deltas:
            async for delta in deltas:
                await stream.send(delta)
                if delta.usage is not None:
                    usage += delta.usage
                    timings = delta.timings if exchange.wants_timings else None
        await exchange.end_stream(events.summary(usage if with_usage else None, timings) + DONE)

    async def _respond(self, exchange: HttpExchange, answer: Answer, collected: Collected) -> None:
        whole = await whole_response(self._kind, answer, collected)
        headers = list(JSON)
        if whole.timings is not None and exchange.wants_timings:
            headers.append((HEADER.encode(), timings_header(whole.timings).encode()))
        await exchange.respond(200, whole.body, headers)


class WholeResponse(NamedTuple):
    """An answer in one piece; of several prompts' times those of the one that ended last."""

    body: bytes
    timings: TimeBudget | None


async def whole_response(kind: Kind[B], answer: Answer, collected: Collected | None = None) -> WholeResponse:
    """The JSON of an answer in one piece, when it has ended. `collected`: its outlet. Raises what it ends in."""
    collected = collected or Collected()
    usage, timings = Usage(0, 0, 0), None
    async with contextlib.aclosing(answer.deltas) as deltas:
        async for delta in deltas:
            collected.write(delta)
            if delta.usage is not None:
                usage += delta.usage
                timings = delta.timings
    response = CompletionResponse(
        id=kind.id_prefix + answer.request_id,
        object=kind.object_name,
        created=answer.accepted_unix_s,
        model=answer.model,
        choices=[kind.choice(whole, deltas_with_logprobs) for whole, deltas_with_logprobs in collected.choices()],
        usage=usage_object(usage),
        system_fingerprint=answer.system_fingerprint,
    )
    return WholeResponse(msgspec.json.encode(response), timings)


def _parse_event_id(event_id: str) -> tuple[str, int]:
    """The answer's id and the position of the event. Raises InvalidRequest."""
    answer_id, _, position = event_id.rpartition(":")
    if not answer_id or not re.fullmatch(r"[0-9]{1,9}", position):
        raise InvalidRequest(
            f"Last-Event-ID must be the id of an event of a resumable answer, but is {event_id[:200]!r}.",
            field="last-event-id",
        )
    return answer_id, int(position)


def completion_kind(reader: RequestReader) -> Kind[CompletionBody]:
    return Kind(
        id_prefix="cmpl-",
        object_name="text_completion",
        decoder=msgspec.json.Decoder(CompletionBody),
        read=reader.completion,
        events=CompletionEvents,
        choice=lambda whole, deltas: CompletionChoice(
            whole.choice, whole.text, FINISH_REASONS[whole.finish_reason], completion_logprobs(deltas)
        ),
    )


def chat_kind(reader: RequestReader) -> Kind[ChatBody]:
    return Kind(
        id_prefix="chatcmpl-",
        object_name="chat.completion",
        decoder=msgspec.json.Decoder(ChatBody),
        read=reader.chat,
        events=ChatEvents,
        choice=lambda whole, deltas: ChatChoice(
            whole.choice, AnswerMessage(whole.text), FINISH_REASONS[whole.finish_reason], chat_logprobs(deltas)
        ),
    )
