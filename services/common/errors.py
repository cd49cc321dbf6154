"""Errors that a caller is told about, and the interceptor that turns them into gRPC status.

HeadraceError                    code                  HTTP  whose mistake
├── InvalidRequest               INVALID_ARGUMENT      400   the caller's: names the field
├── NotFound                     NOT_FOUND             404   the caller's: names the thing
├── Mismatch                     FAILED_PRECONDITION   409   nobody's: the two sides do not fit together
├── Overloaded                   RESOURCE_EXHAUSTED    429   nobody's: try again after `retry_after_s`
├── Unavailable                  UNAVAILABLE           503   ours, passing
├── DeadlineExceeded             DEADLINE_EXCEEDED     503   the deadline passed before the answer began
└── RequestFailed                INTERNAL              500   ours: the request failed on the way

The message of each is one sentence that says what and why. Everything else that escapes a servicer is a bug: it is
logged with the request id and answered INTERNAL without details.
"""

import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, ClassVar, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

log = logging.getLogger(__name__)


class HeadraceError(Exception):
    """Base of every error that a caller is told about."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = 500

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(HeadraceError):
    """The request cannot be served as it is. `field` names the part at fault, as the caller wrote it."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotFound(HeadraceError):
    """The caller names something that is not there."""

    code = grpc.StatusCode.NOT_FOUND
    http_status = 404


class Mismatch(HeadraceError):
    """What the caller relies on is otherwise here, as another KV format."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409


class Overloaded(HeadraceError):
    """A queue or a limit is full."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429

    def __init__(self, message: str, *, reason: str = "queue_full", retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class Unavailable(HeadraceError):
    """Something we need is away for now."""

    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    reason = "unavailable"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(HeadraceError):
    """The request's deadline passed before its answer began."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 503
    reason = "deadline"
    retry_after_s = 1


class RequestFailed(HeadraceError):
    """The request was accepted and failed on our side."""


@contextlib.contextmanager
def failures_logged(logger: logging.Logger, what: str) -> Iterator[None]:
    """For work that is repeated whatever comes of it: what fails is logged as `what`, and the next turn tries again."""
    try:
        yield
    except Exception:
        logger.exception(what)


Context = grpc.aio.ServicerContext[Any, Any]
# A string: grpc's own class is generic only in its type stubs.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns HeadraceError into gRPC status, and anything else into INTERNAL with a log line."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        one = (_read_one(handler.request_deserializer), handler.response_serializer)
        each = (_read_each(handler.request_deserializer), handler.response_serializer)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_guard_unary(handler.unary_unary, method), *one)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(_guard_unary(handler.stream_unary, method), *each)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_guard_stream(handler.unary_stream, method), *one)
        return grpc.stream_stream_rpc_method_handler(_guard_stream(handler.stream_stream, method), *each)


def _read_each(deserialize: Any) -> Any:
    """For a stream of requests, whose reader is told: raises InvalidRequest for what is no such message."""

    def read(content: bytes) -> Any:
        try:
            return deserialize(content)
        except DecodeError as error:
            raise InvalidRequest(f"This is no message of the method's type: {error}.") from None

    return read


def _read_one(deserialize: Any) -> Any:
    """For a single request, which grpc reads before the guards are there: gives them the InvalidRequest to raise."""
    read_each = _read_each(deserialize)

    def read(content: bytes) -> Any:
        try:
            return read_each(content)
        except InvalidRequest as error:
            return error

    return read


def _guard_unary(call: Any, method: str) -> Any:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            if isinstance(request, InvalidRequest):
                raise request
            return await call(request, context)
        except HeadraceError as error:
            await context.abort(error.code, error.message, _last_metadata(error, context))
        except Exception as error:  # noqa: BLE001 - here unexpected errors end: logged, answered INTERNAL
            await _abort_unexpected(error, method, context)

    return guarded


def _guard_stream(call: Any, method: str) -> Any:
    if not inspect.isasyncgenfunction(call):  # a coroutine that writes to the context, as grpc's health servicer does
        return _guard_unary(call, method)

    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            if isinstance(request, InvalidRequest):
                raise request
            async for message in call(request, context):
                yield message
        except HeadraceError as error:
            await context.abort(error.code, error.message, _last_metadata(error, context))
        except Exception as error:  # noqa: BLE001 - here unexpected errors end: logged, answered INTERNAL
            await _abort_unexpected(error, method, context)

    return guarded


def _last_metadata(error: HeadraceError, context: Context) -> tuple[tuple[str, str | bytes], ...]:
    """What the servicer has set already, and when to come back, as HTTP says it too."""
    metadata = tuple((name, value) for name, value in context.trailing_metadata() or ())
    if (seconds := getattr(error, "retry_after_s", None)) is None:
        return metadata
    return (*metadata, ("retry-after", str(seconds)))


async def _abort_unexpected(error: Exception, method: str, context: Context) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, NotImplementedError) and context.code() == grpc.StatusCode.UNIMPLEMENTED:
        # What generated servicers do where a method is left out, as grpc's health servicer leaves out List.
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not served.")
    metadata = dict(context.invocation_metadata() or ())
    log.error("%s failed, request %s", method, metadata.get("x-request-id", "-"), exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "The server failed while it handled this call; its log says why.")
