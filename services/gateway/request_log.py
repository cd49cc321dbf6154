"""One line in the log for each request that was accepted, at its end: who, how much, how long, where, how it ended."""

import logging
import time
from typing import Any

from headrace.v1.sampling_pb2 import FinishReason, Priority
from services.common.redis.queue import FIRST_ATTEMPT
from services.gateway.active_request import ActiveRequest

log = logging.getLogger(__name__)

_FINISHES = {number: name.removeprefix("FINISH_REASON_").lower() for name, number in FinishReason.items() if number}
_PRIORITIES = {number: name.removeprefix("PRIORITY_").lower() for name, number in Priority.items()}


class RequestLog:
    """Writes these lines at INFO; where that is off a request costs one comparison."""

    def __init__(self, *, texts: bool) -> None:
        """`texts`: whether prompts and answers are written, too."""
        self._texts = texts
        if texts:
            log.warning("prompts and answers are written to this log, since log_texts is set")

    def ended(self, active: ActiveRequest, outcome: str) -> None:
        """The request has ended, as `outcome` says. Fields that say nothing are left out."""
        if not log.isEnabledFor(logging.INFO):
            return
        fields = {name: value for name, value in self._fields(active).items() if value not in ("", None)}
        log.info("request %s: %s", active.id, outcome, extra={"fields": {"outcome": outcome, **fields}})

    def _fields(self, active: ActiveRequest) -> dict[str, Any]:
        request, usage, arrived = active.request, active.usage(), active.request.caller.arrived
        return {
            "request_id": request.caller.request_id,
            "internal_id": active.id,
            "trace_id": active.job.traceparent[3:35],
            "model": request.model.name,
            "key": request.caller.key_id,
            "priority": _PRIORITIES[request.priority],
            "prompt_tokens": usage.prompt_tokens,
            "cached_prompt_tokens": usage.cached_prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish": ",".join(_FINISHES[choice.finish_reason] for choice in active.choices if choice.finished),
            "queue_ms": _milliseconds(arrived, active.placed_at),
            "ttft_ms": _milliseconds(arrived, active.first_token_at),
            "total_ms": _milliseconds(arrived, time.monotonic()),
            "attempts": active.attempt - FIRST_ATTEMPT + 1,
            "worker": active.worker_id,
            "cost": usage.cost,
            "error": active.error.message if active.error else "",
            **(_texts(active) if self._texts else {}),
        }


def _milliseconds(begin: float, end: float | None) -> float | None:
    return None if end is None else round((end - begin) * 1000, 3)


def _texts(active: ActiveRequest) -> dict[str, Any]:
    decode = active.request.model.tokenizer.decode
    answers = [decode(choice.token_ids) for choice in active.choices]
    return {"prompt": decode(active.request.prompt_ids), "answers": answers}
