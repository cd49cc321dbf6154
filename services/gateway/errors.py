"""Errors that only the gateway knows, each with the code that OpenAI's clients look for.

InvalidRequest
├── ContextLengthExceeded    400  context_length_exceeded
├── BodyTimeout              408
├── BodyTooLarge             413  body_too_large
└── IdempotencyKeyReused     422  idempotency_key_reused
NotFound
├── ModelNotFound            404  model_not_found
└── AnswerNotFound           404  answer_not_found
Overloaded
├── LimitReached             429  rate_limit_exceeded
└── QuotaExhausted           429  insufficient_quota
HeadraceError
├── InvalidKey               401  invalid_api_key
├── NotAllowed               403
├── AnswerElsewhere          503
├── MethodNotAllowed         405
└── RequestCancelled         499
"""

from typing import ClassVar

import grpc

from services.common.errors import HeadraceError, InvalidRequest, NotFound, Overloaded


class ContextLengthExceeded(InvalidRequest):
    """Prompt and asked-for tokens do not fit the model's context."""

    openai_code: ClassVar[str] = "context_length_exceeded"


class BodyTimeout(InvalidRequest):
    """The HTTP body takes too long to arrive; it is read no further."""

    http_status = 408


class HeadTooLarge(InvalidRequest):
    """The headers are too many, or too long."""

    http_status = 431


class BodyTooLarge(InvalidRequest):
    """The HTTP body is longer than the limit; it is read no further."""

    http_status = 413
    openai_code: ClassVar[str] = "body_too_large"


class IdempotencyKeyReused(InvalidRequest):
    """The key names another request of the same caller."""

    http_status = 422
    openai_code: ClassVar[str] = "idempotency_key_reused"


class ModelNotFound(NotFound):
    """No worker of this deployment serves that model."""

    openai_code: ClassVar[str] = "model_not_found"
    field: ClassVar[str] = "model"


class AnswerNotFound(NotFound):
    """Nothing is kept of that answer for this caller (any more)."""

    openai_code: ClassVar[str] = "answer_not_found"


class AnswerElsewhere(HeadraceError):
    """The answer goes on, but not on this gateway."""

    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    reason = "answer_elsewhere"
    retry_after_s = 1


class RequestCancelled(HeadraceError):
    """Somebody asked for the request to end."""

    code = grpc.StatusCode.CANCELLED
    http_status = 499


class LimitReached(Overloaded):
    """A limit of the caller's key or of its group has no room for the request now."""

    openai_code: ClassVar[str] = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message, reason="rate_limit", retry_after_s=retry_after_s)


class QuotaExhausted(Overloaded):
    """A budget of the caller's key or of its group has no room for the request now."""

    openai_code: ClassVar[str] = "insufficient_quota"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message, reason="quota", retry_after_s=retry_after_s)


class InvalidKey(HeadraceError):
    """The call has no API key, or one that does not work. The message never tells more of it than its visible part."""

    code = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401
    openai_code: ClassVar[str] = "invalid_api_key"


class NotAllowed(HeadraceError):
    """The caller's key works, or its page is there, but not for this."""

    code = grpc.StatusCode.PERMISSION_DENIED
    http_status = 403

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class MethodNotAllowed(HeadraceError):
    """The path is there, but not for that HTTP method. `allow`: those that it takes, as the header has them."""

    http_status = 405

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow
