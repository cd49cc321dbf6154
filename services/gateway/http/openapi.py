"""The OpenAPI document of the public HTTP routes, made from the structs that the routes read and write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from services.gateway.http.cluster_api import ClusterObject
from services.gateway.http.openai_requests import UNSUPPORTED, UNSUPPORTED_IN_MESSAGES
from services.gateway.http.openai_types import (
    ChatBody,
    ChatChoice,
    CompletionBody,
    CompletionChoice,
    CompletionResponse,
    ErrorObject,
    ModelList,
    ModelObject,
    StatusObject,
)
from services.gateway.http.openapi_headers import (
    OF_COMPLETIONS,
    OF_PAGES,
    OF_READINESS,
    USUAL,
    Headers,
    answer_headers,
    request_headers,
)
from services.gateway.http.stats_api import StatsObject
from services.gateway.http.tokenize_api import (
    UNSUPPORTED_IN_TOKENIZE,
    DetokenizeBody,
    DetokenizeResponse,
    TokenizeBody,
    TokenizeResponse,
)
from services.gateway.validation import COMPLETION_RANGES, RANGES, Range

VERSION = "1"
_JSON, _EVENTS, _TEXT = "application/json", "text/event-stream", "text/plain"
_OPENMETRICS = "application/openmetrics-text"

# What each status but 200 says.
_ERRORS = {
    304: "The caller's copy is the newest.",
    400: "The request is not valid; `error.param` names the field.",
    401: "There is no API key, or one that does not work.",
    403: "The key may not do this, or not with this model; or the page may not call.",
    404: "There is no such model or answer, or metrics are off.",
    405: "The path is not for the method that was sent; Allow says which it takes.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    422: "The Idempotency-Key names another request.",
    429: "A queue, a limit or a budget is full; Retry-After says when to come back.",
    431: "The headers are too many, or too long.",
    499: "Somebody cancelled the request.",
    500: "The server failed; its log says why.",
    503: "Something is away for now, or the deadline passed; Retry-After says when to come back.",
}
_OPEN = (403, 405, 431, 500)
_KEYED = (*_OPEN, 401, 503)
_BODY = (*_KEYED, 400, 404, 408, 413, 429)
_ANSWER = (*_KEYED, 400, 404, 429, 499)


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `answer`: what a 200 holds, by media type; None is any text. `errors`: other statuses."""

    method: str
    path: str
    summary: str
    answer: Mapping[str, Any]
    errors: Sequence[int]
    body: type[msgspec.Struct] | None = None
    headers: Headers = USUAL
    open: bool = False  # needs no API key


OPERATIONS = (
    Operation(
        "post",
        "/v1/chat/completions",
        "Answers a chat; with `stream`, as server-sent events.",
        {_JSON: CompletionResponse[ChatChoice], _EVENTS: None},
        (*_BODY, 422, 499),
        ChatBody,
        OF_COMPLETIONS,
    ),
    Operation(
        "post",
        "/v1/completions",
        "Continues a prompt; with `stream`, as server-sent events.",
        {_JSON: CompletionResponse[CompletionChoice], _EVENTS: None},
        (*_BODY, 422, 499),
        CompletionBody,
        OF_COMPLETIONS,
    ),
    Operation(
        "post", "/tokenize", "Token ids of a prompt or of messages.", {_JSON: TokenizeResponse}, _BODY, TokenizeBody
    ),
    Operation("post", "/detokenize", "The text of token ids.", {_JSON: DetokenizeResponse}, _BODY, DetokenizeBody),
    Operation("get", "/v1/models", "The models that the key may use.", {_JSON: ModelList}, _KEYED),
    Operation("get", "/v1/models/{name}", "One model.", {_JSON: ModelObject}, (*_KEYED, 404)),
    Operation(
        "get",
        "/v1/cluster",
        "The workers and queues of the models that the key may use, and the schedulers.",
        {_JSON: ClusterObject},
        _KEYED,
    ),
    Operation(
        "get",
        "/v1/answers/{answer_id}",
        "A recorded answer, when it has ended.",
        {_JSON: CompletionResponse[CompletionChoice]},
        _ANSWER,
    ),
    Operation(
        "post",
        "/v1/answers/{answer_id}/cancel",
        "Ends a request whose answer is recorded.",
        {_JSON: StatusObject},
        (*_KEYED, 404),
    ),
    Operation("get", "/health/live", "The process runs.", {_JSON: StatusObject}, _OPEN, open=True),
    Operation(
        "get",
        "/health/ready",
        "Requests can be taken; 503 says why not.",
        {_JSON: StatusObject},
        (*_OPEN, 503),
        headers=OF_READINESS,
        open=True,
    ),
    Operation(
        "get",
        "/metrics",
        "Metrics in Prometheus' text format, or OpenMetrics.",
        {_TEXT: None, _OPENMETRICS: None},
        (*_OPEN, 404),
        open=True,
    ),
    Operation("get", "/v1/stats", "How requests went, by model and window.", {_JSON: StatsObject}, _OPEN, open=True),
    Operation("get", "/openapi.json", "This document.", {_JSON: None}, _OPEN, open=True),
    Operation("get", "/docs", "This document as a page.", {"text/html": None}, _OPEN, open=True),
    Operation(
        "get",
        "/",
        "A page to chat and to watch the cluster.",
        {"text/html": None},
        (*_OPEN, 304),
        headers=OF_PAGES,
        open=True,
    ),
    Operation(
        "get",
        "/playground/{name}",
        "A file of that page.",
        {"*/*": None},
        (*_OPEN, 304, 404),
        headers=OF_PAGES,
        open=True,
    ),
)

# By the name of a schema: its fields that ask for what is not there, with the values that ask for nothing.
UNSUPPORTED_FIELDS: Mapping[str, Mapping[str, Sequence[object]]] = {
    "ChatBody": UNSUPPORTED,
    "CompletionBody": UNSUPPORTED,
    "ChatMessage": UNSUPPORTED_IN_MESSAGES,
    "TokenizeBody": UNSUPPORTED_IN_TOKENIZE,
}


def openapi_document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Headrace", "version": VERSION, "description": "OpenAI-compatible API of the gateway."},
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    names = [part.strip("{}") for part in operation.path.split("/") if part.startswith("{")]
    told: dict[str, Any] = {
        "summary": operation.summary,
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names),
            *request_headers(operation.headers),
        ],
        "responses": {
            str(status): {
                "description": _ERRORS.get(status, "The answer."),
                "headers": answer_headers(operation.headers, status),
                "content": {media: _content(kind) for media, kind in _answers(operation, status).items()},
            }
            for status in sorted((200, *operation.errors))
        },
        "security": [{}] if operation.open else [{"bearer": []}, {"key": []}],
    }
    if operation.body is not None:
        told["requestBody"] = {"required": True, "content": {_JSON: _content(operation.body)}}
    return told


def _answers(operation: Operation, status: int) -> Mapping[str, Any]:
    """By media type. Readiness says of itself why it is not there; all other errors are OpenAI's."""
    if status == 200:
        return operation.answer
    if status == 304:
        return {}
    return {_JSON: StatusObject if status == 503 and operation.path == "/health/ready" else ErrorObject}


def _content(answer: Any) -> dict[str, Any]:
    if answer is None:
        return {"schema": {}}
    [schema], _ = msgspec.json.schema_components([answer], ref_template="#/components/schemas/{name}")
    return {"schema": schema}


def _schemas() -> dict[str, Any]:
    """All structs, their numbers with the ranges that are checked, and what is refused named so."""
    used = [kind for one in OPERATIONS for kind in (one.body, *one.answer.values()) if kind is not None]
    _, schemas = msgspec.json.schema_components([*used, ErrorObject], ref_template="#/components/schemas/{name}")
    for name, unsupported in UNSUPPORTED_FIELDS.items():
        for field, neutral in unsupported.items():
            if field in schemas[name]["properties"]:
                schemas[name]["properties"][field] |= {"description": "Not supported yet.", "enum": list(neutral)}
    for name, ranges in (("ChatBody", RANGES), ("CompletionBody", {**RANGES, **COMPLETION_RANGES})):
        for field, schema in schemas[name]["properties"].items():
            for option in schema.get("anyOf", ()):
                if field in ranges and option["type"] in ("integer", "number"):
                    option.update(_limits(ranges[field]))
    return schemas


def _limits(limits: Range) -> dict[str, float]:
    told = {"minimum" if limits.low_included else "exclusiveMinimum": limits.low}
    return told if limits.unbounded else told | {"maximum": limits.high}
