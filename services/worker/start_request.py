"""Checks a `Start` and turns it into the engine's sequences.

Knows the model's limits; knows nothing of streams or of how busy the worker is.
"""

import math
import secrets
import struct
from collections.abc import Hashable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from headrace.v1 import sampling_pb2, worker_pb2
from services.common.block_hash import chain_root
from services.common.errors import InvalidRequest
from services.worker.capacity import Room
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams

_MOST_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What of the model bounds a request."""

    name: str  # as callers give it; enters the root of chain hashes
    vocabulary_size: int
    max_context_tokens: int
    block_size: int
    eos_token_ids: frozenset[int]
    max_sequences: int


def build_sequences(start: worker_pb2.Start, keys: Items[Hashable], limits: ModelLimits) -> list[Sequence]:
    """One sequence per choice, named by `keys`. Raises InvalidRequest if the request can never run here."""
    if len(keys) > limits.max_sequences:
        raise InvalidRequest(
            f"{len(keys)} choices are more than the {limits.max_sequences} sequences that run at once."
        )
    prompt = _token_ids(start.prompt_ids, "prompt", limits)
    if not prompt:
        raise InvalidRequest("The prompt is empty.", field="prompt")
    sampling = _sampling(start.sampling, limits)
    stop = _stop(start.stopping, len(prompt), limits)
    root = chain_root(limits.name, limits.block_size, start.cache_salt)
    sequences: list[Sequence] = []
    for choice, key in zip(start.choices, keys, strict=True):
        delivered = _token_ids(choice.delivered_ids, "delivered output", limits)
        if len(delivered) >= stop.max_tokens:
            raise InvalidRequest(f"{len(delivered)} delivered tokens leave nothing of max_tokens {stop.max_tokens}.")
        sequences.append(
            Sequence(
                key=key,
                tokens=prompt + delivered,
                prompt_length=len(prompt),
                sampling=sampling,
                stop=stop,
                choice=choice.choice,
                cache_root=root,
                leader=sequences[0] if sequences else None,
            )
        )
    return sequences


def demand_of(sequences: Items[Sequence], block_size: int, coming_blocks: int = 0) -> Room:
    """What a request takes at its start: the first choice computes the prompt, the others share its full blocks.

    `coming_blocks`: leading blocks that are not computed here, but brought from elsewhere.
    """
    first, *others = sequences
    return Room(
        sequences=len(sequences),
        blocks=-(-len(first.tokens) // block_size) + len(others),
        prefill_tokens=max(1, len(first.tokens) - coming_blocks * block_size),
    )


def count_ids(packed: bytes) -> int:
    """How many token ids, of four bytes each, are packed."""
    return len(packed) // 4


def _token_ids(packed: bytes, what: str, limits: ModelLimits) -> list[int]:
    if len(packed) % 4:
        raise InvalidRequest(f"The {what}'s token ids are 4 bytes each, and {len(packed)} bytes are no whole number.")
    ids = list(struct.unpack(f"<{count_ids(packed)}I", packed))
    if ids and (highest := max(ids)) >= limits.vocabulary_size:
        raise InvalidRequest(f"The {what} has token id {highest}, and the vocabulary has {limits.vocabulary_size}.")
    return ids


def _sampling(sent: sampling_pb2.Sampling, limits: ModelLimits) -> SamplingParams:
    def given(field: str, default: float) -> float:
        return float(getattr(sent, field)) if sent.HasField(field) else default  # type: ignore[arg-type]

    params = SamplingParams(
        temperature=given("temperature", 1.0),
        top_p=given("top_p", 1.0),
        top_k=sent.top_k,
        min_p=given("min_p", 0.0),
        seed=sent.seed if sent.HasField("seed") else secrets.randbits(64),
        presence_penalty=given("presence_penalty", 0.0),
        frequency_penalty=given("frequency_penalty", 0.0),
        repetition_penalty=given("repetition_penalty", 1.0),
        logit_bias=_logit_bias(sent, limits),
        logprobs=sent.logprobs if sent.HasField("logprobs") else None,
    )
    # Written so that NaN, which compares false with everything, is refused too.
    checks = {
        "temperature": (0.0 <= params.temperature <= 2.0, "between 0 and 2"),
        "top_p": (0.0 < params.top_p <= 1.0, "above 0 and at most 1"),
        "top_k": (params.top_k >= 0, "at least 0"),
        "min_p": (0.0 <= params.min_p <= 1.0, "between 0 and 1"),
        "presence_penalty": (-2.0 <= params.presence_penalty <= 2.0, "between -2 and 2"),
        "frequency_penalty": (-2.0 <= params.frequency_penalty <= 2.0, "between -2 and 2"),
        "logprobs": (0 <= (params.logprobs or 0) <= _MOST_LOGPROBS, f"between 0 and {_MOST_LOGPROBS}"),
        "repetition_penalty": (0.0 < params.repetition_penalty < math.inf, "above 0 and finite"),
    }
    for field, (holds, rule) in checks.items():
        if not holds:
            raise InvalidRequest(f"{field} must be {rule}, got {getattr(params, field):g}.", field=field)
    return params


def _logit_bias(sent: sampling_pb2.Sampling, limits: ModelLimits) -> tuple[tuple[int, float], ...]:
    for token, bias in sent.logit_bias.items():
        if token >= limits.vocabulary_size:
            raise InvalidRequest(
                f"logit_bias has token id {token}, and the vocabulary has {limits.vocabulary_size}.", field="logit_bias"
            )
        if not -100.0 <= bias <= 100.0:
            raise InvalidRequest(f"logit_bias must be between -100 and 100, got {bias:g}.", field="logit_bias")
    return tuple(sorted(sent.logit_bias.items()))


def _stop(sent: sampling_pb2.Stopping, prompt_tokens: int, limits: ModelLimits) -> StopParams:
    room = limits.max_context_tokens - prompt_tokens
    if room < 1:
        raise InvalidRequest(
            f"The prompt has {prompt_tokens} tokens, which leaves no room for an answer in the context of "
            f"{limits.max_context_tokens}.",
            field="prompt",
        )
    max_tokens = sent.max_tokens if sent.HasField("max_tokens") else room
    if not 1 <= max_tokens <= room:
        raise InvalidRequest(
            f"max_tokens must be between 1 and {room}, which a prompt of {prompt_tokens} tokens leaves of the context "
            f"of {limits.max_context_tokens}, got {max_tokens}.",
            field="max_tokens",
        )
    if not 0 <= sent.min_tokens <= max_tokens:
        raise InvalidRequest(
            f"min_tokens must be between 0 and max_tokens {max_tokens}, got {sent.min_tokens}.", field="min_tokens"
        )
    stop_token_ids = frozenset(sent.stop_token_ids)
    if stop_token_ids and (highest := max(stop_token_ids)) >= limits.vocabulary_size:
        raise InvalidRequest(
            f"Stop token id {highest} is not in the vocabulary of {limits.vocabulary_size}.", field="stop_token_ids"
        )
    if not sent.ignore_eos:
        stop_token_ids |= limits.eos_token_ids
    return StopParams(max_tokens=max_tokens, min_tokens=sent.min_tokens, stop_token_ids=stop_token_ids)
