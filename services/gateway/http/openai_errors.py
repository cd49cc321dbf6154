"""Errors in OpenAI's shape."""

import msgspec

from services.common.errors import HeadraceError
from services.gateway.errors import MethodNotAllowed
from services.gateway.http.openai_types import ErrorDetail, ErrorObject

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def error_body(error: HeadraceError) -> bytes:
    """The JSON body that says what went wrong."""
    detail = ErrorDetail(
        message=error.message,
        type=_TYPES.get(error.http_status, "invalid_request_error"),
        param=getattr(error, "field", None),
        code=getattr(error, "openai_code", None),
        reason=getattr(error, "reason", msgspec.UNSET),
        retry_after_seconds=getattr(error, "retry_after_s", msgspec.UNSET),
    )
    return msgspec.json.encode(ErrorObject(detail))


def error_headers(error: HeadraceError) -> list[tuple[bytes, bytes]]:
    """Content type; how to come in after 401; what may come after 405; when to come back after 429 and 503; and after
    408, that the rest of the body is not read.
    """
    headers = [(b"content-type", b"application/json")]
    if error.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allow.encode()))
    if error.http_status in (429, 503):
        headers.append((b"retry-after", str(getattr(error, "retry_after_s", 1)).encode()))
    if error.http_status == 408:
        headers.append((b"connection", b"close"))
    return headers
