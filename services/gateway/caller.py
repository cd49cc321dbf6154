"""What comes with a call beside its body, over HTTP and gRPC alike.

A request has two ids that begin alike: callers see the one they chose, which they may use again, and jobs, workers,
traces and logs have `<caller's id>.<8 hex digits>`, which is unique. Where the caller chose none, both are the same.
"""

import re
import secrets
from dataclasses import dataclass, field

from services.common.errors import InvalidRequest
from services.gateway.keys.account import Account

SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
LONGEST_TIMEOUT_MS = 10**12 - 1


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, since when, and for how long it may take."""

    # The id in `x-request-id` and in the answer, the caller's if it is sane.
    request_id: str
    # The id in jobs, on workers, in traces and logs.
    internal_id: str
    # Loop time of the arrival, and how many seconds from then the first token may take.
    arrived: float
    timeout_s: float
    # W3C trace context of the caller, or empty.
    traceparent: str = ""
    # Names the API key that the call came with; empty for a caller without one.
    key_id: str = ""
    # What that key allows.
    account: Account = field(default_factory=Account)


def sane_request_id(wanted: str | None) -> str:
    """The caller's request id, or a new one if it is missing or cannot be a log field."""
    return wanted if wanted and SANE_REQUEST_ID.fullmatch(wanted) else secrets.token_hex(16)


def internal_id(request_id: str, wanted: str | None) -> str:
    """The unique id of the request that callers know as `request_id`; `wanted` is what the caller sent."""
    return f"{request_id}.{secrets.token_hex(4)}" if request_id == wanted else request_id


def timeout_seconds(milliseconds: str | None, default_s: float) -> float:
    """The value of `x-request-timeout-ms` in seconds."""
    if milliseconds is None:
        return default_s
    if not re.fullmatch(r"[0-9]{1,20}", milliseconds) or not 1 <= int(milliseconds) <= LONGEST_TIMEOUT_MS:
        raise InvalidRequest(
            f"x-request-timeout-ms must be a whole number above 0, but is {milliseconds[:40]!r}.",
            field="x-request-timeout-ms",
        )
    return int(milliseconds) / 1000
