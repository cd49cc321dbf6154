"""POST /v1/completions and /v1/chat/completions: raw ASGI, since every token passes here."""

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from services.common.errors import HeadraceError, RequestFailed
from services.gateway.admission import Admission
from services.gateway.caller import Caller
from services.gateway.config import GatewaySettings
from services.gateway.errors import MethodNotAllowed
from services.gateway.generate import Generator
from services.gateway.http_exchange import CLIENT_GONE_STATUS, ClientGone, HttpExchange, Receive, Scope, Send
from services.gateway.keys import Keys
from services.gateway.merge import merge
from services.gateway.metrics import Metrics
from services.gateway.openai_events import DONE, FINISH_REASONS, ChatEvents, CompletionEvents, usage_object
from services.gateway.openai_requests import RequestReader, parse
from services.gateway.openai_types import (
    AnswerMessage,
    ChatBody,
    ChatChoice,
    CommonBody,
    CompletionBody,
    CompletionChoice,
    CompletionResponse,
)
from services.gateway.request import Delta, GenerationRequest, Usage

log = logging.getLogger(__name__)

B = TypeVar("B", bound=CommonBody)
_JSON = ((b"content-type", b"application/json"),)


@dataclass(frozen=True, slots=True)
class Kind(Generic[B]):
    """What makes one of the two APIs."""

    id_prefix: str
    object_name: str
    decoder: "msgspec.json.Decoder[B]"
    read: Callable[[B, Caller], Awaitable[list[GenerationRequest]]]
    events: type[CompletionEvents]
    choices: Callable[[list[Delta]], list[CompletionChoice] | list[ChatChoice]]


class CompletionRoute(Generic[B]):
    """The ASGI application of one of the two routes."""

    def __init__(
        self,
        path: str,
        kind: Kind[B],
        generator: Generator,
        admission: Admission,
        keys: Keys,
        metrics: Metrics,
        settings: GatewaySettings,
    ) -> None:
        self._path = path
        self._kind = kind
        self._generator = generator
        self._admission = admission
        self._keys = keys
        self._metrics = metrics
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = HttpExchange(
            scope,
            receive,
            send,
            comment_every_s=self._settings.sse_comment_every_s,
            write_timeout_s=self._settings.write_timeout_s,
        )
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowed(f"{self._path} takes POST, not {scope['method']}.")
            await self._handle(exchange)
        except ClientGone:
            exchange.status = CLIENT_GONE_STATUS
        except HeadraceError as error:
            await exchange.fail(error)
        except Exception:
            log.exception("request %s failed", exchange.internal_id)
            await exchange.fail(RequestFailed("The server failed while it handled this request; its log says why."))
        self._metrics.http_requests.labels(self._path, str(exchange.status)).inc()

    async def _handle(self, exchange: HttpExchange) -> None:
        settings = self._settings
        with self._admission.entering():  # before the body takes up memory
            exchange.account = await self._keys.identify(exchange.credential, "generate")
            caller = exchange.caller(settings.default_timeout_s)
            content = await exchange.read_body(settings.max_body_bytes, settings.read_timeout_s)
            body = parse(content, self._kind.decoder)
            requests = await self._kind.read(body, caller)
            self._admission.check_load(requests[0])
        deltas = self._deltas(requests)
        await exchange.while_connected(
            self._stream(exchange, body, deltas) if body.stream else self._respond(exchange, body, deltas)
        )

    def _deltas(self, requests: list[GenerationRequest]) -> AsyncGenerator[Delta, None]:
        streams = [self._generator.generate(request) for request in requests]
        return streams[0] if len(streams) == 1 else merge(streams, requests[0].choices)

    async def _stream(self, exchange: HttpExchange, body: B, deltas: AsyncGenerator[Delta, None]) -> None:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        events = self._kind.events(self._response_id(exchange), body.model, int(time.time()), with_usage=with_usage)
        usage = Usage(0, 0, 0)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                # A delta whose text is held back is no event, but the first one of a choice opens it.
                if delta.text or delta.finish_reason or not delta.seq:
                    await exchange.send_event(events.delta(delta))
                if delta.usage is not None:
                    usage += delta.usage
        await exchange.end_stream(events.usage(usage) + DONE if with_usage else DONE)

    async def _respond(self, exchange: HttpExchange, body: B, deltas: AsyncGenerator[Delta, None]) -> None:
        collected: dict[int, Delta] = {}
        usage = Usage(0, 0, 0)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                whole = collected.setdefault(delta.choice, delta)
                if whole is not delta:
                    whole.text += delta.text
                    whole.finish_reason = delta.finish_reason
                if delta.usage is not None:
                    usage += delta.usage
        response = CompletionResponse(
            id=self._response_id(exchange),
            object=self._kind.object_name,
            created=int(time.time()),
            model=body.model,
            choices=self._kind.choices([collected[index] for index in sorted(collected)]),
            usage=usage_object(usage),
        )
        await exchange.respond(200, msgspec.json.encode(response), _JSON)

    def _response_id(self, exchange: HttpExchange) -> str:
        return self._kind.id_prefix + exchange.request_id


def completion_kind(reader: RequestReader) -> Kind[CompletionBody]:
    return Kind(
        id_prefix="cmpl-",
        object_name="text_completion",
        decoder=msgspec.json.Decoder(CompletionBody),
        read=reader.completion,
        events=CompletionEvents,
        choices=lambda wholes: [
            CompletionChoice(whole.choice, whole.text, FINISH_REASONS[whole.finish_reason]) for whole in wholes
        ],
    )


def chat_kind(reader: RequestReader) -> Kind[ChatBody]:
    return Kind(
        id_prefix="chatcmpl-",
        object_name="chat.completion",
        decoder=msgspec.json.Decoder(ChatBody),
        read=reader.chat,
        events=ChatEvents,
        choices=lambda wholes: [
            ChatChoice(whole.choice, AnswerMessage(whole.text), FINISH_REASONS[whole.finish_reason]) for whole in wholes
        ],
    )
