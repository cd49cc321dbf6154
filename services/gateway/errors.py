"""Errors that only the gateway knows, each with the code that OpenAI's clients look for.

InvalidRequest
├── ContextLengthExceeded    400  context_length_exceeded
├── BodyTimeout              408
├── BodyTooLarge             413  body_too_large
└── IdempotencyKeyReused     422  idempotency_key_reused
NotFound
├── ModelNotFound            404  model_not_found
└── AnswerNotFound           404  answer_not_found
HeadraceError
├── AnswerElsewhere          503
├── MethodNotAllowed         405
└── RequestCancelled         499
"""

from typing import ClassVar

import grpc

from services.common.errors import HeadraceError, InvalidRequest, NotFound


class ContextLengthExceeded(InvalidRequest):
    """Prompt and asked-for tokens do not fit the model's context."""

    openai_code: ClassVar[str] = "context_length_exceeded"


class BodyTimeout(InvalidRequest):
    """The HTTP body takes too long to arrive; it is read no further."""

    http_status = 408


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


class MethodNotAllowed(HeadraceError):
    """The path is there, but not for that HTTP method."""

    http_status = 405
