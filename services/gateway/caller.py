"""What comes with a call beside its body, over HTTP and gRPC alike."""

import re
import secrets
from dataclasses import dataclass

from services.common.errors import InvalidRequest

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, since when, and for how long it may take."""

    # The id in `x-request-id`, the caller's if it is sane.
    request_id: str
    # Loop time of the arrival, and how many seconds from then the first token may take.
    arrived: float
    timeout_s: float
    # W3C trace context of the caller, or empty.
    traceparent: str = ""


def sane_request_id(wanted: str | None) -> str:
    """The caller's request id, or a new one if it is missing or cannot be a log field."""
    return wanted if wanted and _SANE_REQUEST_ID.fullmatch(wanted) else secrets.token_hex(16)


def timeout_seconds(milliseconds: str | None, default_s: float) -> float:
    """The value of `x-request-timeout-ms` in seconds."""
    if milliseconds is None:
        return default_s
    if not re.fullmatch(r"[0-9]{1,12}", milliseconds) or int(milliseconds) == 0:
        raise InvalidRequest(
            f"x-request-timeout-ms must be a whole number above 0, but is {milliseconds[:40]!r}.",
            field="x-request-timeout-ms",
        )
    return int(milliseconds) / 1000
