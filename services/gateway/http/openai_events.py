"""The server-sent events of one streamed completion: what is the same in all of them is encoded once per stream."""

import msgspec

from headrace.v1.sampling_pb2 import FinishReason
from services.common.errors import HeadraceError
from services.gateway.http.openai_errors import error_body
from services.gateway.http.openai_logprobs import chat_logprobs, completion_logprobs
from services.gateway.http.openai_types import PromptTokensDetails, UsageObject
from services.gateway.request import Delta, Usage
from services.gateway.time_budget import TimeBudget
from services.gateway.timings import timings_object

DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"

FINISH_REASONS = {
    FinishReason.FINISH_REASON_UNSPECIFIED: None,
    FinishReason.FINISH_REASON_STOP: "stop",
    FinishReason.FINISH_REASON_LENGTH: "length",
}
_ENDINGS = {reason: msgspec.json.encode(name) for reason, name in FINISH_REASONS.items()}
_encode = msgspec.json.Encoder().encode


class CompletionEvents:
    """Events of POST /v1/completions."""

    object_name = "text_completion"

    def __init__(
        self,
        response_id: str,
        model: str,
        created: int,
        *,
        with_usage: bool,
        answer_id: str = "",
        system_fingerprint: str = "",
    ) -> None:
        """`answer_id`: events get ids, by which a caller can go on with the answer."""
        head = {
            "id": response_id,
            "object": self.object_name,
            "created": created,
            "model": model,
            "system_fingerprint": system_fingerprint,
        }
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._id = b"id: %b:" % answer_id.encode() if answer_id else b""
        self._tail = b'}],"usage":null}\n\n' if with_usage else b"}]}\n\n"

    def event(self, delta: Delta) -> bytes:
        """The event of one delta, with its id if it has one."""
        if not self._id:
            return self.delta(delta)
        return b"%b%d\n%b" % (self._id, delta.position, self.delta(delta))

    def delta(self, delta: Delta) -> bytes:
        """The event of one delta, without an id."""
        return b'%b{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b' % (
            self._head,
            delta.choice,
            _encode(delta.text),
            b"null" if delta.logprobs is None else _encode(completion_logprobs([delta])),
            _ENDINGS[delta.finish_reason],
            self._tail,
        )

    def summary(self, usage: Usage | None, timings: TimeBudget | None) -> bytes:
        """The event before the last, with what the caller asked for; empty if that is nothing."""
        fields = b""
        if usage is not None:
            fields += b',"usage":%b' % _encode(usage_object(usage))
        if timings is not None:
            fields += b',"timings":%b' % _encode(timings_object(timings))
        return b"%b]%b}\n\n" % (self._head, fields) if fields else b""


class ChatEvents(CompletionEvents):
    """Events of POST /v1/chat/completions. A choice's first one says whose words these are."""

    object_name = "chat.completion.chunk"

    def delta(self, delta: Delta) -> bytes:
        role = b"" if delta.seq else b'"role":"assistant",'
        return b'%b{"index":%d,"delta":{%b"content":%b},"logprobs":%b,"finish_reason":%b%b' % (
            self._head,
            delta.choice,
            role,
            _encode(delta.text),
            b"null" if delta.logprobs is None else _encode(chat_logprobs([delta])),
            _ENDINGS[delta.finish_reason],
            self._tail,
        )


def error_event(error: HeadraceError) -> bytes:
    """An error after the answer began."""
    return b"data: %b\n\n" % error_body(error)


def usage_object(usage: Usage) -> UsageObject:
    return UsageObject(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(usage.cached_prompt_tokens),
        cost=msgspec.UNSET if usage.cost is None else usage.cost,
    )
