"""From OpenAI's JSON bodies to validated requests."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from headrace.v1.sampling_pb2 import Priority, Sampling, Stopping
from services.common.errors import InvalidRequest
from services.gateway import validation
from services.gateway.caller import Caller
from services.gateway.catalog import Catalog, Model
from services.gateway.config import GatewaySettings
from services.gateway.http.openai_types import ChatBody, ChatMessage, CommonBody, CompletionBody, ContentPart
from services.gateway.request import GenerationRequest

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_PRIORITIES = {"high": Priority.PRIORITY_HIGH, "normal": Priority.PRIORITY_NORMAL, "low": Priority.PRIORITY_LOW}
# Fields that ask for what is not there, each with the values that ask for nothing.
UNSUPPORTED: Mapping[str, Sequence[object]] = {
    "suffix": (None, ""),
    "best_of": (None, 1),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "audio": (None,),
    "modalities": (None, ["text"]),
}
# The same of a chat's messages.
UNSUPPORTED_IN_MESSAGES: Mapping[str, Sequence[object]] = {"tool_calls": (None, []), "function_call": (None,)}
_NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
    "min_tokens",
)


def chat_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Messages as chat templates take them. Raises InvalidRequest that names the message at fault."""
    if not messages:
        raise InvalidRequest("messages must not be empty.", field="messages")
    return [_message(message, position) for position, message in enumerate(messages)]


def check_unsupported(asked: object, unsupported: Mapping[str, Sequence[object]], prefix: str = "") -> None:
    """Raises InvalidRequest for a field that asks for what is not there; `prefix`: what callers write before it."""
    for field, neutral in unsupported.items():
        value = getattr(asked, field, None)
        if not any(value == allowed and type(value) is type(allowed) for allowed in neutral):
            raise InvalidRequest(f"{prefix}{field} is not supported yet: leave it out.", field=prefix + field)


class RequestReader:
    """Validates bodies against the models and the gateway's limits."""

    def __init__(self, catalog: Catalog, settings: GatewaySettings) -> None:
        self._catalog = catalog
        self._settings = settings

    async def completion(self, body: CompletionBody, caller: Caller) -> list[GenerationRequest]:
        """One request per prompt, in their order."""
        model = self._check_common(body, caller)
        validation.check_ranges({"logprobs": body.logprobs}, validation.COMPLETION_RANGES)
        if body.echo and body.logprobs is not None:
            raise InvalidRequest(
                "echo and logprobs exclude each other: a prompt's tokens have no log-probabilities.", field="echo"
            )
        prompts = _prompts(body.prompt)
        if len(prompts) > self._settings.max_prompts:
            raise InvalidRequest(
                f"prompt takes at most {self._settings.max_prompts} prompts, but has {len(prompts)}.", field="prompt"
            )
        requests = []
        for position, prompt in enumerate(prompts):
            own = caller if len(prompts) == 1 else replace(caller, internal_id=f"{caller.internal_id}-{position}")
            ids = await _encode_prompt(prompt, model)
            max_tokens = validation.token_budget(
                model,
                len(ids),
                body.max_tokens,
                _DEFAULT_COMPLETION_TOKENS,
                prompt_field="prompt",
                max_tokens_field="max_tokens",
            )
            echo = _echo(prompt, model) if body.echo else ""
            requests.append(_request(body, own, model, ids, max_tokens, body.logprobs, echo))
        return requests

    async def chat(self, body: ChatBody, caller: Caller) -> list[GenerationRequest]:
        """The one request that a chat is."""
        model = self._check_common(body, caller)
        validation.check_ranges(
            {"max_completion_tokens": body.max_completion_tokens, "top_logprobs": body.top_logprobs}
        )
        ids = await model.tokenizer.encode_chat(chat_messages(body.messages))
        new_name = body.max_completion_tokens is not None
        max_tokens = validation.token_budget(
            model,
            len(ids),
            body.max_completion_tokens if new_name else body.max_tokens,
            caller.account.default_max_tokens,
            prompt_field="messages",
            max_tokens_field="max_completion_tokens" if new_name else "max_tokens",
        )
        return [_request(body, caller, model, ids, max_tokens, _chat_logprobs(body))]

    def _check_common(self, body: CommonBody, caller: Caller) -> Model:
        caller.account.check_model(body.model)
        model = self._catalog.get(body.model)
        check_unsupported(body, UNSUPPORTED)
        validation.check_ranges({field: getattr(body, field) for field in _NUMBERS})
        validation.check_choices(1 if body.n is None else body.n, self._settings.max_choices)
        validation.check_stop_strings(_stops(body))
        validation.check_stop_token_ids(body.stop_token_ids or (), model)
        validation.check_logit_bias(body.logit_bias or {}, model)
        validation.check_cache_salt(body.cache_salt or "")
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options needs stream to be true.", field="stream_options")
        return model


def _request(
    body: CommonBody,
    caller: Caller,
    model: Model,
    ids: Sequence[int],
    max_tokens: int,
    logprobs: int | None,
    echo: str = "",
) -> GenerationRequest:
    validation.check_min_tokens(body.min_tokens or 0, max_tokens)
    return GenerationRequest(
        caller=caller,
        model=model,
        prompt_ids=ids,
        operation="chat" if isinstance(body, ChatBody) else "text_completion",
        sampling=_sampling(body, logprobs),
        stopping=_stopping(body, max_tokens),
        choices=1 if body.n is None else body.n,
        cache_salt=caller.account.cache_salt(body.cache_salt or ""),
        priority=caller.account.priority(_priority(body.priority)),
        deterministic=bool(body.deterministic),
        echo=echo,
    )


def _sampling(body: CommonBody, logprobs: int | None) -> Sampling:
    return Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=None if body.top_k is None else max(0, body.top_k),  # -1 is another way to say all
        min_p=body.min_p,
        seed=None if body.seed is None else body.seed % 2**64,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias,
        logprobs=logprobs,
    )


def _stopping(body: CommonBody, max_tokens: int) -> Stopping:
    return Stopping(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop_token_ids=body.stop_token_ids or (),
        stop=_stops(body),
    )


def _chat_logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", field="top_logprobs")
    return None


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    ids: list[int] = [item for item in prompt if isinstance(item, int)]
    if not prompt:
        raise InvalidRequest("prompt must not be empty.", field="prompt")
    if len(ids) == len(prompt):
        return [ids]
    if ids:
        raise InvalidRequest("prompt must be all text or all token ids, but mixes them.", field="prompt")
    return [item for item in prompt if not isinstance(item, int)]


async def _encode_prompt(prompt: str | list[int], model: Model) -> list[int]:
    if isinstance(prompt, list):
        validation.check_token_ids(prompt, model, field="prompt")
        return prompt
    if not prompt:
        raise InvalidRequest("prompt must not be empty.", field="prompt")
    return await model.tokenizer.encode_text(prompt)


def _echo(prompt: str | list[int], model: Model) -> str:
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)


def _message(message: ChatMessage, position: int) -> dict[str, str]:
    field = f"messages[{position}]"
    check_unsupported(message, UNSUPPORTED_IN_MESSAGES, f"{field}.")
    return validation.chat_message(message.role, _text(message.content, f"{field}.content"), field)


def _text(content: str | list[ContentPart] | None, field: str) -> str:
    """A message's text; parts are joined by line breaks, as vLLM does."""
    if content is None:
        raise InvalidRequest(f"{field} must be a text or a list of text parts.", field=field)
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if part.type != "text" or part.text is None:
            raise InvalidRequest(
                f"{field} has a part of type {validation.shorten(part.type)}; only text is supported.", field=field
            )
        texts.append(part.text)
    return "\n".join(texts)


def _stops(body: CommonBody) -> Sequence[str]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else body.stop


def _priority(priority: str | int | None) -> Priority.ValueType:
    """By name, or as in vLLM by number: the smaller the earlier, 0 is normal. Unspecified if there is none."""
    if priority is None:
        return Priority.PRIORITY_UNSPECIFIED
    if priority == 0:
        return Priority.PRIORITY_NORMAL
    if isinstance(priority, int):
        return Priority.PRIORITY_HIGH if priority < 0 else Priority.PRIORITY_LOW
    if priority not in _PRIORITIES:
        raise InvalidRequest(
            f"priority must be high, normal, low or a number, but is {validation.shorten(priority)}.", field="priority"
        )
    return _PRIORITIES[priority]
