"""Errors that only the gateway knows, each with the code that OpenAI's clients look for.

InvalidRequest
├── ContextLengthExceeded    400  context_length_exceeded
├── BodyTimeout              408
└── BodyTooLarge             413  body_too_large
NotFound
└── ModelNotFound            404  model_not_found
HeadraceError
└── MethodNotAllowed         405
"""

from typing import ClassVar

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


class ModelNotFound(NotFound):
    """No worker of this deployment serves that model."""

    openai_code: ClassVar[str] = "model_not_found"
    field: ClassVar[str] = "model"


class MethodNotAllowed(HeadraceError):
    """The path is there, but not for that HTTP method."""

    http_status = 405
