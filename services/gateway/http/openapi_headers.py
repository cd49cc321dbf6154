"""Headers in the OpenAPI document: those that a gateway reads, and those of its answers.

Keys have a place of their own there, and OpenAPI leaves out `accept`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.gateway import timings
from services.gateway.answers.recording import LONGEST_KEY
from services.gateway.caller import LONGEST_TIMEOUT_MS, SANE_REQUEST_ID

_ANY_TEXT: Mapping[str, Any] = {"type": "string"}


@dataclass(frozen=True, slots=True)
class HeaderField:
    """One header. `always`: an answer has it each time; no request must have any."""

    name: str
    description: str
    schema: Mapping[str, Any] = field(default_factory=lambda: _ANY_TEXT)
    always: bool = False


@dataclass(frozen=True, slots=True)
class Headers:
    """Of one kind of operation: what it reads beside what all do, and what answers have instead of what others have, by
    status.
    """

    read: Sequence[HeaderField] = ()
    answered: Mapping[int, Sequence[HeaderField]] = field(default_factory=dict)


_WANTED_ID = HeaderField(
    "x-request-id",
    "Comes back, and stands in every log line. Another shape than this is replaced.",
    {"type": "string", "pattern": f"^{SANE_REQUEST_ID.pattern}$"},
)
_REQUEST_ID = HeaderField("x-request-id", "The request's, or a new one.", always=True)
_ETAG = HeaderField("etag", "Names this content of the file.", always=True)
_RETRY_AFTER = HeaderField("retry-after", "Seconds.", {"type": "integer", "minimum": 1}, always=True)
_LIMITS = tuple(
    HeaderField(f"x-ratelimit-{word}-{unit}", f"{meaning} {unit} per minute, for a key with such a limit.", schema)
    for unit in ("requests", "tokens")
    for word, meaning, schema in (
        ("limit", "The limit of", {"type": "integer", "minimum": 1}),
        ("remaining", "What is left of", {"type": "integer", "minimum": 0}),
        ("reset", "How long until nothing is used of", _ANY_TEXT),
    )
)
_TIMINGS = HeaderField(timings.HEADER, "Where the time went, as Server-Timing has it; if it was asked for.")
_BY_STATUS: Mapping[int, Sequence[HeaderField]] = {
    401: (HeaderField("www-authenticate", "Bearer.", always=True),),
    405: (HeaderField("allow", "The methods that the path takes.", always=True),),
    429: (_RETRY_AFTER,),
    503: (_RETRY_AFTER,),
}

USUAL = Headers()
OF_COMPLETIONS = Headers(
    (
        HeaderField(
            "x-request-timeout-ms",
            "How long the first token may take.",
            {"type": "integer", "minimum": 1, "maximum": LONGEST_TIMEOUT_MS},
        ),
        HeaderField(
            "idempotency-key",
            "A repeated request gets the first one's answer.",
            {"type": "string", "minLength": 1, "maxLength": LONGEST_KEY},
        ),
        HeaderField(
            "last-event-id",
            "Goes on with a stream after this event of it.",
            {"type": "string", "pattern": "^.+:[0-9]{1,9}$"},
        ),
        HeaderField("traceparent", "The caller's trace, as W3C has it."),
        HeaderField(timings.HEADER, "1 asks where the request's time went.", {"type": "string", "enum": ["1"]}),
    ),
    {200: (*_LIMITS, _TIMINGS), 429: (_RETRY_AFTER, *_LIMITS)},
)
OF_PAGES = Headers(
    (HeaderField("if-none-match", "The ETag of the copy that the caller has."),), {200: (_ETAG,), 304: (_ETAG,)}
)
OF_READINESS = Headers(answered={503: ()})  # asked again and again anyway


def request_headers(headers: Headers) -> list[dict[str, Any]]:
    """Parameters of an operation."""
    return [
        {"name": one.name, "in": "header", "description": one.description, "schema": one.schema}
        for one in (_WANTED_ID, *headers.read)
    ]


def answer_headers(headers: Headers, status: int) -> dict[str, Any]:
    """Those of an answer. Only what was refused for its head has no id."""
    told = [*headers.answered.get(status, _BY_STATUS.get(status, ())), *([] if status == 431 else [_REQUEST_ID])]
    return {one.name: {"description": one.description, "required": one.always, "schema": one.schema} for one in told}
