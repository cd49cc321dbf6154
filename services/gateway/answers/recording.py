"""Which answers are recorded, under which name, and what of them: requests and deltas as Redis keeps them."""

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.v1.answer_pb2 import AnswerError, AnswerEvent, StoredRequest
from headrace.v1.inference_pb2 import Usage as UsageMessage
from services.common.errors import (
    DeadlineExceeded,
    HeadraceError,
    InvalidRequest,
    Mismatch,
    NotFound,
    Overloaded,
    RequestFailed,
    Unavailable,
)
from services.common.machine_costs import NANOS
from services.gateway.caller import Caller
from services.gateway.catalog import Model
from services.gateway.errors import RequestCancelled
from services.gateway.keys.account import Account
from services.gateway.request import Delta, GenerationRequest, Usage, pack_ids, unpack_ids
from services.gateway.text.choice import Choice
from services.gateway.text.logprobs import LogprobReader

LONGEST_KEY = 255
_ERRORS: dict[int, type[HeadraceError]] = {
    error.code.value[0]: error
    for error in (
        InvalidRequest,
        NotFound,
        Mismatch,
        Overloaded,
        Unavailable,
        DeadlineExceeded,
        RequestFailed,
        RequestCancelled,
    )
}


@dataclass(frozen=True, slots=True)
class Recording:
    """That an answer is kept for its caller. Requests of one id and one fingerprint share it."""

    answer_id: str
    fingerprint: bytes


def recording(caller: Caller, content: bytes, *, resumable: bool, idempotency_key: str | None) -> Recording | None:
    """How the answer to `content` is to be recorded, if it is. Raises InvalidRequest for a bad key."""
    if idempotency_key is not None:
        if not 0 < len(idempotency_key) <= LONGEST_KEY:
            raise InvalidRequest(
                f"An idempotency key has 1 to {LONGEST_KEY} characters, but this one has {len(idempotency_key)}.",
                field="idempotency-key",
            )
        name = f"{caller.key_id}\0{idempotency_key}".encode()
        return Recording(f"idem-{hashlib.sha256(name).hexdigest()[:32]}", hashlib.sha256(content).digest())
    return Recording(caller.internal_id, b"") if resumable else None


def stored_request(request: GenerationRequest) -> StoredRequest:
    caller = request.caller
    now_ms = time.time() * 1000
    waited_ms = (asyncio.get_running_loop().time() - caller.arrived) * 1000
    return StoredRequest(
        internal_id=caller.internal_id,
        request_id=caller.request_id,
        key_id=caller.key_id,
        model=request.model.name,
        prompt_ids=pack_ids(request.prompt_ids),
        sampling=request.sampling,
        stopping=request.stopping,
        choices=request.choices,
        cache_salt=request.cache_salt,
        priority=request.priority,
        deterministic=request.deterministic,
        accepted_unix_ms=int(now_ms),
        deadline_unix_ms=int(now_ms - waited_ms + caller.timeout_s * 1000),
        traceparent=caller.traceparent,
        echo=request.echo,
        system_fingerprint=request.model.system_fingerprint,
    )


def restored_request(stored: StoredRequest, model: Model, account: Account) -> GenerationRequest:
    """The request as a gateway goes on with it that did not take it in itself."""
    caller = Caller(
        request_id=stored.request_id,
        internal_id=stored.internal_id,
        arrived=asyncio.get_running_loop().time(),
        timeout_s=max(0.0, stored.deadline_unix_ms / 1000 - time.time()),
        traceparent=stored.traceparent,
        key_id=stored.key_id,
        account=account,
    )
    return GenerationRequest(
        caller=caller,
        model=model,
        prompt_ids=unpack_ids(stored.prompt_ids),
        sampling=stored.sampling,
        stopping=stored.stopping,
        choices=stored.choices,
        cache_salt=stored.cache_salt,
        priority=stored.priority,
        deterministic=stored.deterministic,
        echo=stored.echo,
    )


def event_of(delta: Delta) -> AnswerEvent:
    usage = delta.usage
    return AnswerEvent(
        choice=delta.choice,
        token_ids=pack_ids(delta.token_ids),
        finish_reason=delta.finish_reason,
        logprobs=None if delta.logprobs is None else delta.logprobs.values,
        usage=None
        if usage is None
        else UsageMessage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_prompt_tokens=usage.cached_prompt_tokens,
            cost=usage.cost,
        ),
    )


def error_event_of(error: HeadraceError) -> AnswerEvent:
    return AnswerEvent(error=AnswerError(code=error.code.value[0], message=error.message))


def replay(choices: Sequence[Choice], event: AnswerEvent, position: int) -> Delta:
    """The delta that an event was made of, given the choices as they were before it. Raises the error that it is."""
    if event.HasField("error"):
        raise _ERRORS.get(event.error.code, RequestFailed)(event.error.message)
    logprobs = event.logprobs if event.HasField("logprobs") else None
    delta = choices[event.choice].advance(unpack_ids(event.token_ids), event.finish_reason, logprobs)
    delta.position = position
    if event.HasField("usage"):
        usage = event.usage
        cost_nanos = round(usage.cost * NANOS) if usage.HasField("cost") else None
        delta.usage = Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens, cost_nanos)
    return delta


def new_choices(model: Model, request: StoredRequest | GenerationRequest) -> list[Choice]:
    """The choices of a request before their first token."""
    tokenizer = model.tokenizer

    def reader() -> LogprobReader | None:
        asked = request.sampling.HasField("logprobs")
        return LogprobReader(tokenizer.detokenizer(), tokenizer.spelling.bytes_of) if asked else None

    return [
        Choice(index, tokenizer.detokenizer(), request.stopping, reader(), request.echo)
        for index in range(request.choices)
    ]
