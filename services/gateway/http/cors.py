"""CORS: which pages may call this gateway from a browser. Knows no routes; wraps the whole ASGI application.

Keys travel in headers and never in cookies, so no answer allows credentials, and a page of another origin has nothing
but the keys that it holds itself.
"""

from collections.abc import Sequence

from services.gateway.errors import NotAllowed
from services.gateway.http.exchange import AsgiApp, Header, Message, Receive, Scope, Send
from services.gateway.http.openai_errors import error_body, error_headers
from services.gateway.timings import HEADER

ANY_ORIGIN = "*"

_METHODS = b"GET, POST"
# Seconds that a browser may remember an answer to a preflight: what is taken from `cors_origins` soon stops working.
_REMEMBERED_S = b"600"
_EXPOSED = b", ".join(
    [
        b"x-request-id",
        b"retry-after",
        HEADER.encode(),
        *(
            b"x-ratelimit-%s-%s" % (word, unit)
            for word in (b"limit", b"remaining", b"reset")
            for unit in (b"requests", b"tokens")
        ),
    ]
)


class Cors:
    """The application, with what browsers ask before they let a page of one of these origins call it."""

    def __init__(self, app: AsgiApp, origins: Sequence[str]) -> None:
        """`origins`: as browsers send them, such as `https://chat.example.com`; ANY_ORIGIN stands for all."""
        self._app = app
        self._origins = frozenset(origin.encode() for origin in origins)
        self._any = ANY_ORIGIN in origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None and scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            await self._answer_preflight(origin, headers.get(b"access-control-request-headers"), send)
            return
        told = self._for_origin(origin)

        async def send_with_origin(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *told]
            await send(message)

        await self._app(scope, receive, send_with_origin)

    def _for_origin(self, origin: bytes | None) -> list[Header]:
        """Headers of an answer. Caches are told that it differs by origin, also where there is none."""
        if self._any:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
        if origin not in self._origins:
            return [(b"vary", b"origin")]
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"origin"),
        ]

    async def _answer_preflight(self, origin: bytes, wanted: bytes | None, send: Send) -> None:
        """Any header may be sent: a gateway reads those that it knows, and clients send many more."""
        if not self._any and origin not in self._origins:
            refusal = NotAllowed("Pages of this origin may not call this gateway: its cors_origins do not name it.")
            await _respond(send, refusal.http_status, error_body(refusal), error_headers(refusal))
            return
        headers = [
            (b"access-control-allow-origin", b"*" if self._any else origin),
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-max-age", _REMEMBERED_S),
            (b"vary", b"origin, access-control-request-headers"),
        ]
        if wanted is not None:
            headers.append((b"access-control-allow-headers", wanted))
        await _respond(send, 204, b"", headers)


async def _respond(send: Send, status: int, body: bytes, headers: list[Header]) -> None:
    length = [(b"content-length", b"%d" % len(body))] if body else []
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *length]})
    await send({"type": "http.response.body", "body": body})
