"""The shapes of OpenAI's completion APIs, as msgspec structs. Unknown fields change nothing."""

from typing import Any, Generic, TypeVar

import msgspec

from services.gateway.http.openai_logprobs import ChatLogprobs, CompletionLogprobs

TokenIds = list[int]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class CommonBody(msgspec.Struct, kw_only=True):
    """Fields that both completion APIs have, and Headrace's extensions (the second group, named as in vLLM)."""

    model: str
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Whose request it is, to the caller; changes nothing.
    user: str | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    cache_salt: str | None = None
    priority: str | int | None = None
    deterministic: bool | None = None
    resumable: bool | None = None


class CompletionBody(CommonBody, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | TokenIds]
    logprobs: int | None = None
    suffix: Any = None
    best_of: Any = None
    echo: bool | None = None


class ContentPart(msgspec.Struct):
    # Only `text` is supported.
    type: str | None = None
    text: str | None = None


class ChatMessage(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: Any = None
    function_call: Any = None


class ChatBody(CommonBody, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class UsageObject(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    # What machines spent on it, where their price is set; a field of OpenRouter's.
    cost: float | msgspec.UnsetType = msgspec.UNSET


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: str | None
    logprobs: CompletionLogprobs | None = None


class AnswerMessage(msgspec.Struct):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: AnswerMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None


C = TypeVar("C", bound=msgspec.Struct)  # of choice


class CompletionResponse(msgspec.Struct, Generic[C]):
    id: str
    object: str
    created: int
    model: str
    choices: list[C]
    usage: UsageObject
    system_fingerprint: str


class StatusObject(msgspec.Struct, omit_defaults=True):
    status: str
    reason: str | None = None


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    # Of an error after which it is worth coming again.
    reason: str | msgspec.UnsetType = msgspec.UNSET
    retry_after_seconds: int | msgspec.UnsetType = msgspec.UNSET


class ErrorObject(msgspec.Struct):
    error: ErrorDetail


class ModelObject(msgspec.Struct):
    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "headrace"


class ModelList(msgspec.Struct):
    data: list[ModelObject]
    object: str = "list"
