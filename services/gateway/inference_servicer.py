"""The public gRPC Inference service: translates, and delegates to `generate`."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Self

import grpc.aio

from headrace.v1 import inference_pb2
from headrace.v1.inference_pb2_grpc import InferenceServicer as InferenceBase
from headrace.v1.sampling_pb2 import Priority, Sampling, Stopping
from services.common.api_keys import Scope
from services.common.errors import InvalidRequest, Overloaded
from services.gateway import timings, validation
from services.gateway.admission import Admission
from services.gateway.answers.answers import Answer, Answers
from services.gateway.answers.recording import recording
from services.gateway.caller import Caller, internal_id, sane_request_id, timeout_seconds
from services.gateway.catalog import Catalog, Model
from services.gateway.config import GatewaySettings
from services.gateway.errors import RequestCancelled
from services.gateway.keys.account import Account
from services.gateway.keys.keys import Keys, credential_of
from services.gateway.keys.limit_answers import rate_limit_headers
from services.gateway.metrics import Metrics
from services.gateway.request import Delta, GenerationRequest, Usage

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(InferenceBase):
    """Generate, Resume, Cancel, ListModels, Tokenize and GetStats."""

    def __init__(
        self,
        answers: Answers,
        admission: Admission,
        keys: Keys,
        catalog: Catalog,
        metrics: Metrics,
        settings: GatewaySettings,
    ) -> None:
        self._answers = answers
        self._admission = admission
        self._keys = keys
        self._catalog = catalog
        self._metrics = metrics
        self._settings = settings

    # Generate and Resume write to the context themselves: a generator is not told that its client reads no more.
    async def Generate(  # type: ignore[override]
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        with self._metrics.counting_shed():
            caller = self._caller(context, await self._identify(context, "generate"))
        with self._metrics.counting_shed(), _limits_told(context, caller):
            with self._admission.entering():
                wanted = await self._read(request, caller)
                content = request.SerializeToString(deterministic=True)
                key = _metadata(context).get("idempotency-key")
                answer = await self._answers.begin(
                    [wanted], recording(caller, content, resumable=request.resumable, idempotency_key=key)
                )
            await self._send(answer, context, caller)

    async def Resume(  # type: ignore[override]
        self, request: inference_pb2.ResumeRequest, context: Context
    ) -> None:
        caller = self._caller(context, await self._identify(context, "generate"))
        answer = await self._answers.resume(request.answer_id, max(0, request.next_position), caller.key_id)
        await self._send(answer, context, caller)

    async def Cancel(self, request: inference_pb2.CancelRequest, context: Context) -> inference_pb2.CancelResponse:
        account = await self._identify(context, "generate")
        await self._answers.cancel(request.answer_id, account.key_id)
        return inference_pb2.CancelResponse()

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        account = await self._identify(context, "models")
        models = [_model_card(model) for model in self._catalog.usable() if account.allows_model(model.name)]
        return inference_pb2.ListModelsResponse(models=models)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        (await self._identify(context, "models")).check_model(request.model)
        model = self._catalog.get(request.model)
        if request.WhichOneof("prompt") is None:
            raise InvalidRequest("prompt must be text or chat.", field="prompt")
        if request.HasField("chat"):
            return inference_pb2.TokenizeResponse(token_ids=await _encode_chat(request.chat, model))
        return inference_pb2.TokenizeResponse(token_ids=await model.tokenizer.encode_text(request.text))

    async def GetStats(
        self, request: inference_pb2.GetStatsRequest, context: Context
    ) -> inference_pb2.InferenceMetrics:
        return self._metrics.stats.report(sketches=request.sketches)

    async def _send(self, answer: Answer, context: Context, caller: Caller) -> None:
        """Sends all deltas. Raises RequestCancelled when the client does not read them."""
        begun, timed = False, timings.are_wanted(_metadata(context).get(timings.HEADER))
        with _Writer(context, self._settings.write_timeout_s) as writer:
            async with contextlib.aclosing(answer.deltas) as deltas:
                async for delta in deltas:
                    if not begun:
                        begun = await _begin(context, caller)
                    await writer.write(_delta_message(delta, answer, timed=timed))

    async def _identify(self, context: Context, scope: Scope) -> Account:
        metadata = _metadata(context)
        return await self._keys.identify(credential_of(metadata.get("authorization"), metadata.get("x-api-key")), scope)

    def _caller(self, context: Context, account: Account) -> Caller:
        metadata = _metadata(context)
        timeout_s = timeout_seconds(metadata.get("x-request-timeout-ms"), self._settings.default_timeout_s)
        remaining_s = context.time_remaining()
        wanted_id = metadata.get("x-request-id")
        request_id = sane_request_id(wanted_id)
        return Caller(
            request_id=request_id,
            internal_id=internal_id(request_id, wanted_id),
            arrived=asyncio.get_running_loop().time(),
            timeout_s=timeout_s if remaining_s is None else min(timeout_s, remaining_s),
            traceparent=metadata.get("traceparent", ""),
            key_id=account.key_id,
            account=account,
        )

    async def _read(self, request: inference_pb2.GenerateRequest, caller: Caller) -> GenerationRequest:
        caller.account.check_model(request.model)
        model = self._catalog.get(request.model)
        _check_numbers(request.sampling, request.stopping)
        choices = request.n if request.HasField("n") else 1
        validation.check_choices(choices, self._settings.max_choices)
        validation.check_stop_strings(request.stopping.stop)
        validation.check_stop_token_ids(request.stopping.stop_token_ids, model)
        validation.check_logit_bias(request.sampling.logit_bias, model)
        validation.check_cache_salt(request.cache_salt)
        prompt_ids = await _prompt_ids(request, model)
        stopping = Stopping()
        stopping.CopyFrom(request.stopping)
        stopping.max_tokens = validation.token_budget(
            model,
            len(prompt_ids),
            stopping.max_tokens if stopping.HasField("max_tokens") else None,
            caller.account.default_max_tokens,
            prompt_field=request.WhichOneof("prompt") or "prompt",
            max_tokens_field="max_tokens",
        )
        validation.check_min_tokens(stopping.min_tokens, stopping.max_tokens)
        sampling = Sampling()
        sampling.CopyFrom(request.sampling)
        sampling.top_k = max(0, sampling.top_k)
        return GenerationRequest(
            caller=caller,
            model=model,
            prompt_ids=prompt_ids,
            operation="chat" if request.HasField("chat") else "text_completion",
            sampling=sampling,
            stopping=stopping,
            choices=choices,
            cache_salt=caller.account.cache_salt(request.cache_salt),
            priority=caller.account.priority(_priority(request.priority)),
            deterministic=request.deterministic,
        )


class _Writer:
    """Writes the messages of one call, and ends it when its client does not take one."""

    def __init__(self, context: Context, timeout_s: float) -> None:
        self._context = context
        self._timeout_s = timeout_s
        self._gone = False
        # The message that is on its way until the client has room for it.
        self._sending: inference_pb2.GenerateDelta | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "gRPC runs each call in a task"
        self._task = task
        self._look_later()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    async def write(self, message: inference_pb2.GenerateDelta) -> None:
        """Returns once it is sent. `_look` bounds that: a timeout around each would cost as much as the message.

        Raises RequestCancelled when the client does not take it, CancelledError when it has gone.
        """
        self._sending = message
        try:
            await self._context.write(message)
        except asyncio.CancelledError:
            if not self._gone:
                raise
            self._task.uncancel()
            raise RequestCancelled(f"The client read nothing for {self._timeout_s:g} s.") from None
        except grpc.aio.BaseError as error:  # the call has ended, and gRPC is about to cancel its task
            raise asyncio.CancelledError from error
        self._sending = None

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._look, self._sending)

    def _look(self, seen: inference_pb2.GenerateDelta | None) -> None:
        """Gives the client up if the message that was on its way at the last look still is."""
        if seen is not None and seen is self._sending:
            self._gone = True
            self._task.cancel()
        else:
            self._look_later()


async def _begin(context: Context, caller: Caller) -> bool:
    """Sends what comes before an answer. Not earlier: a call that fails without it is tried again by gRPC's clients."""
    await context.send_initial_metadata((("x-request-id", caller.request_id), *_rate_limits(caller)))
    return True


@contextlib.contextmanager
def _limits_told(context: Context, caller: Caller) -> Iterator[None]:
    """A refused call ends with how the limits of its key stand."""
    try:
        yield
    except Overloaded:
        context.set_trailing_metadata(_rate_limits(caller))
        raise


def _rate_limits(caller: Caller) -> tuple[tuple[str, str], ...]:
    return tuple((name.decode(), value.decode()) for name, value in rate_limit_headers(caller.account))


def _metadata(context: Context) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _check_numbers(sampling: Sampling, stopping: Stopping) -> None:
    given = [*sampling.ListFields(), *stopping.ListFields()]
    validation.check_ranges({field.name: value for field, value in given if field.name in validation.RANGES})


async def _prompt_ids(request: inference_pb2.GenerateRequest, model: Model) -> Sequence[int]:
    match request.WhichOneof("prompt"):
        case "text":
            if not request.text:
                raise InvalidRequest("text must not be empty.", field="text")
            return await model.tokenizer.encode_text(request.text)
        case "token_ids":
            ids = list(request.token_ids.ids)
            validation.check_token_ids(ids, model, field="token_ids")
            return ids
        case "chat":
            return await _encode_chat(request.chat, model)
        case _:
            raise InvalidRequest("prompt must be text, token_ids or chat.", field="prompt")


async def _encode_chat(chat: inference_pb2.Chat, model: Model) -> list[int]:
    if not chat.messages:
        raise InvalidRequest("chat must have at least one message.", field="chat")
    messages = [
        validation.chat_message(message.role, message.content, f"chat.messages[{position}]")
        for position, message in enumerate(chat.messages)
    ]
    return await model.tokenizer.encode_chat(messages)


def _priority(priority: Priority.ValueType) -> Priority.ValueType:
    if priority not in Priority.values():
        raise InvalidRequest(f"priority must be one of the enum's values, but is {priority}.", field="priority")
    return priority


def _delta_message(delta: Delta, answer: Answer, *, timed: bool) -> inference_pb2.GenerateDelta:
    return inference_pb2.GenerateDelta(
        request_id=answer.request_id,
        answer_id=answer.id,
        position=max(0, delta.position),
        choice=delta.choice,
        seq=delta.seq,
        text=delta.text,
        text_offset=delta.text_offset,
        token_ids=delta.token_ids,
        finish_reason=delta.finish_reason,
        logprobs=None if delta.logprobs is None else delta.logprobs.values,
        usage=None if delta.usage is None else _usage_message(delta.usage),
        timings=timings.timings_message(delta.timings) if timed and delta.timings is not None else None,
    )


def _usage_message(usage: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        cost=usage.cost,
    )


def _model_card(model: Model) -> inference_pb2.ModelCard:
    return inference_pb2.ModelCard(
        name=model.name,
        max_context_tokens=model.max_context_tokens,
        vocabulary_size=model.vocabulary_size,
        created_unix_s=model.created_unix_s,
    )
