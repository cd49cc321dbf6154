"""What goes in and out of `generate`: a request that both fronts build alike, and the deltas that answer it."""

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from headrace.v1.sampling_pb2 import FinishReason, Priority, Sampling, Stopping
from services.common.machine_costs import NANOS
from services.gateway.caller import Caller
from services.gateway.catalog import Model
from services.gateway.text.logprobs import DeltaLogprobs
from services.gateway.time_budget import TimeBudget


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, validated against its model."""

    caller: Caller
    model: Model
    prompt_ids: Sequence[int]
    # A seed is drawn if none is set. `max_tokens` is set and fits the context.
    sampling: Sampling
    stopping: Stopping
    choices: int = 1
    cache_salt: str = ""
    priority: Priority.ValueType = Priority.PRIORITY_NORMAL
    deterministic: bool = False
    # What every choice's text begins with, before its first token.
    echo: str = ""
    # What the caller asked for, as traces name it.
    operation: Literal["text_completion", "chat"] = "text_completion"

    def __post_init__(self) -> None:
        if not self.sampling.HasField("seed"):
            self.sampling.seed = random.getrandbits(63)


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request; `completion_tokens` is summed over its choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    # What machines spent on it, in billionths of the unit of their prices; None where they have none.
    cost_nanos: int | None = None

    @property
    def cost(self) -> float | None:
        """In that unit."""
        return None if self.cost_nanos is None else self.cost_nanos / NANOS

    def __add__(self, other: "Usage") -> "Usage":
        costs = [cost for cost in (self.cost_nanos, other.cost_nanos) if cost is not None]
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_prompt_tokens + other.cached_prompt_tokens,
            sum(costs) if costs else None,
        )


class Delta(msgspec.Struct):
    """A piece of one choice."""

    choice: int
    # Position in its choice's stream, from 0.
    seq: int
    text: str
    # Characters of this choice before `text`.
    text_offset: int
    # Tokens consumed, those whose text is still held back included.
    token_ids: list[int]
    # Set in the last delta of a choice.
    finish_reason: FinishReason.ValueType = FinishReason.FINISH_REASON_UNSPECIFIED
    # Of the tokens, if the request asked for them and there are any.
    logprobs: DeltaLogprobs | None = None
    # Set in the last delta of the request.
    usage: Usage | None = None
    # Where the time went; set beside the usage where the request ran.
    timings: TimeBudget | None = None
    # Place among the deltas of all choices, from 0, where the answer is recorded.
    position: int = -1


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as protocol messages carry them: 4 bytes each, little-endian."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def unpack_ids(packed: bytes) -> list[int]:
    """The ids that `pack_ids` packed."""
    return list(struct.unpack(f"<{len(packed) // 4}I", packed))
