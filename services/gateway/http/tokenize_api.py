"""POST /tokenize and /detokenize, as vLLM has them.

A body may hold a million ids, so what is done with each of them is done in a thread: all streams of the gateway would
stop meanwhile.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from services.common.errors import InvalidRequest
from services.gateway import validation
from services.gateway.catalog import Catalog, Model
from services.gateway.http.exchange import HttpExchange
from services.gateway.http.json_bodies import parse
from services.gateway.http.openai_requests import chat_messages, check_unsupported
from services.gateway.http.openai_types import ChatMessage
from services.gateway.http.post_route import JSON, PostRoute
from services.gateway.keys.account import Account

B = TypeVar("B", bound="TokenizeBody | DetokenizeBody")

# As `openai_requests.UNSUPPORTED`.
UNSUPPORTED_IN_TOKENIZE: Mapping[str, Sequence[object]] = {"tools": (None, []), "add_generation_prompt": (True,)}


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize: a prompt, or messages that become one."""

    model: str
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    # With the BOS token in front that the model wants. Chat templates write their own.
    add_special_tokens: bool = True
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    tools: Any = None


class TokenizeResponse(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize."""

    model: str
    tokens: list[int]


class DetokenizeResponse(msgspec.Struct):
    prompt: str


class TokenRoute(PostRoute, Generic[B]):
    """One of the two routes: what it answers to a body, given the model."""

    def __init__(
        self,
        catalog: Catalog,
        decoder: "msgspec.json.Decoder[B]",
        answer: Callable[[B, Model], Awaitable[object]],
        *shared: Any,
    ) -> None:
        """`shared`: what `PostRoute` takes."""
        super().__init__(*shared)
        self._catalog = catalog
        self._decoder = decoder
        self._answer = answer

    async def handle(self, exchange: HttpExchange) -> None:
        with self.admission.entering():
            account: Account = await self.callers.identify(exchange.headers, "models")
            content = await exchange.read_body(self.settings.max_body_bytes, self.settings.read_timeout_s)
            body = parse(content, self._decoder)
            account.check_model(body.model)
            answer = await self._answer(body, self._catalog.get(body.model))
        await exchange.respond(200, msgspec.json.encode(answer), JSON)


def token_routes(catalog: Catalog, *shared: Any) -> list[PostRoute]:
    """Both routes. `shared`: what `PostRoute` takes beside the path."""
    return [
        TokenRoute(catalog, msgspec.json.Decoder(TokenizeBody), tokenize, "/tokenize", *shared),
        TokenRoute(catalog, msgspec.json.Decoder(DetokenizeBody), detokenize, "/detokenize", *shared),
    ]


async def tokenize(body: TokenizeBody, model: Model) -> TokenizeResponse:
    ids = await _encode(body, model)
    strings = None
    if body.return_token_strs:
        strings = await asyncio.to_thread(_spelled, ids, model)
    return TokenizeResponse(len(ids), model.max_context_tokens, ids, strings)


async def detokenize(body: DetokenizeBody, model: Model) -> DetokenizeResponse:
    return DetokenizeResponse(await asyncio.to_thread(_text, body.tokens, model))


def _spelled(token_ids: list[int], model: Model) -> list[str]:
    return [model.tokenizer.spelling.bytes_of(one).decode("utf-8", "backslashreplace") for one in token_ids]


def _text(token_ids: list[int], model: Model) -> str:
    """Raises InvalidRequest."""
    validation.check_token_ids(token_ids, model, field="tokens")
    return model.tokenizer.decode(token_ids)


async def _encode(body: TokenizeBody, model: Model) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Either prompt or messages must be given, and not both.", field="prompt")
    if body.prompt is not None:
        return await model.tokenizer.encode_text(body.prompt, add_bos=body.add_special_tokens)
    check_unsupported(body, UNSUPPORTED_IN_TOKENIZE)
    return await model.tokenizer.encode_chat(chat_messages(body.messages or []))
