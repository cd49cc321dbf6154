"""What a request may ask for. Every refusal names the field, the value and the limit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.common.errors import InvalidRequest
from services.gateway.catalog import Model
from services.gateway.errors import ContextLengthExceeded

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1_000
MAX_STOP_TOKEN_IDS = 256
MAX_CACHE_SALT_CHARACTERS = 256
MAX_BIASED_TOKENS = 300
_BIAS = 100.0
_INT32_MAX = 2**31 - 1
# A template's names for the roles of OpenAI's API: templates were written before `developer` replaced `system`.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`; `low` itself only if `low_included`."""

    low: float
    high: float
    low_included: bool = True

    @property
    def unbounded(self) -> bool:
        """`high` is no limit that a caller would meet."""
        return self.high >= _INT32_MAX

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.low_included else value > self.low
        return math.isfinite(value) and above and value <= self.high

    def told_to(self, value: float) -> str:
        """The limits as a value beyond them is told: a `high` that few callers meet is told to those that met it."""
        low, high = _digits(self.low), _digits(self.high)
        if self.unbounded and value > self.high:
            return f"at most {high}"
        if self.low_included:
            return f"at least {low}" if self.unbounded else f"between {low} and {high}"
        return f"above {low}" if self.unbounded else f"above {low} and at most {high}"


RANGES: Mapping[str, Range] = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, low_included=False),
    "top_k": Range(-1, _INT32_MAX),
    "min_p": Range(0, 1),
    "seed": Range(-(2**63), 2**64 - 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, _INT32_MAX, low_included=False),
    "max_tokens": Range(1, math.inf),
    "max_completion_tokens": Range(1, math.inf),
    "min_tokens": Range(0, math.inf),
    "logprobs": Range(0, 20),
    "top_logprobs": Range(0, 20),
}
COMPLETION_RANGES: Mapping[str, Range] = {"logprobs": Range(0, 5)}


def check_ranges(values: Mapping[str, float | None], ranges: Mapping[str, Range] = RANGES) -> None:
    """Checks the numbers that are given, by their field names."""
    for field, value in values.items():
        if value is not None and not _within(value, ranges[field]):
            limits = ranges[field].told_to(value)
            raise InvalidRequest(f"{field} must be {limits}, but is {shorten(value)}.", field=field)


def check_choices(choices: int, limit: int) -> None:
    if not 1 <= choices <= limit:
        raise InvalidRequest(f"n must be between 1 and {limit}, but is {shorten(choices)}.", field="n")


def check_stop_strings(stops: Sequence[str]) -> None:
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop takes at most {MAX_STOP_STRINGS} strings, but has {len(stops)}.", field="stop")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"Each stop string must have 1 to {MAX_STOP_CHARACTERS} characters, but one has {len(stop)}.",
                field="stop",
            )


def check_stop_token_ids(token_ids: Sequence[int], model: Model) -> None:
    if len(token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS} ids, but has {len(token_ids)}.", field="stop_token_ids"
        )
    check_token_ids(token_ids, model, field="stop_token_ids")


def check_logit_bias(biases: Mapping[int, float], model: Model) -> None:
    if len(biases) > MAX_BIASED_TOKENS:
        raise InvalidRequest(
            f"logit_bias takes at most {MAX_BIASED_TOKENS} token ids, but has {len(biases)}.", field="logit_bias"
        )
    check_token_ids(list(biases), model, field="logit_bias")
    for token_id, bias in biases.items():
        if not -_BIAS <= bias <= _BIAS:
            raise InvalidRequest(
                f"logit_bias must be between {-_BIAS:g} and {_BIAS:g}, but is {shorten(bias)} for token id {token_id}.",
                field="logit_bias",
            )


def check_cache_salt(salt: str) -> None:
    if len(salt) > MAX_CACHE_SALT_CHARACTERS:
        raise InvalidRequest(
            f"cache_salt has at most {MAX_CACHE_SALT_CHARACTERS} characters, but has {len(salt)}.", field="cache_salt"
        )
    if "\0" in salt:  # it sets the salts of keys apart
        raise InvalidRequest("cache_salt must not have the character NUL.", field="cache_salt")


def check_token_ids(token_ids: Sequence[int], model: Model, *, field: str) -> None:
    """Checks that ids are within the model's vocabulary."""
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= model.vocabulary_size):
        position, bad = next((at, i) for at, i in enumerate(token_ids) if not 0 <= i < model.vocabulary_size)
        raise InvalidRequest(
            f"{field} has the token id {shorten(bad)} at position {position}, "
            f"but ids of {model.name} go from 0 to {model.vocabulary_size - 1}.",
            field=field,
        )


def token_budget(
    model: Model,
    prompt_tokens: int,
    asked: int | None,
    default: int | None,
    *,
    prompt_field: str,
    max_tokens_field: str,
) -> int:
    """Output tokens that a prompt may get.

    `asked` must fit the context beside the prompt; without it, it is `default` or, if None, the rest of the context.
    """
    context = model.max_context_tokens
    if prompt_tokens < 1:
        raise InvalidRequest(f"{prompt_field} must not be empty.", field=prompt_field)
    room = context - prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"{prompt_field} has {prompt_tokens} tokens, but the context of {model.name} is {context} tokens and must "
            f"leave room for at least one more: the limit is {context - 1}.",
            field=prompt_field,
        )
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise ContextLengthExceeded(
            f"{max_tokens_field} is {shorten(asked)} and {prompt_field} has {prompt_tokens} tokens, but the context of "
            f"{model.name} is {context} tokens: at most {room} can be asked for.",
            field=max_tokens_field,
        )
    return asked


def chat_message(role: str, content: str, field: str) -> dict[str, str]:
    """A message as chat templates take it; `field` is what the caller calls it."""
    if role not in _ROLES:
        raise InvalidRequest(
            f"{field}.role must be system, developer, user or assistant, but is {shorten(role)}.",
            field=f"{field}.role",
        )
    return {"role": _ROLES[role], "content": content}


def check_min_tokens(min_tokens: int, max_tokens: int) -> None:
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens must not be above max_tokens ({max_tokens}), but is {shorten(min_tokens)}.", field="min_tokens"
        )


def shorten(value: object) -> str:
    """A caller's value as it can stand in a message."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _digits(limit: float) -> str:
    """Integers whole."""
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def _within(value: float, limits: Range) -> bool:
    # Integers that no float can hold are compared as integers; math.isfinite would overflow on them.
    if isinstance(value, int) and abs(value) > 2**1000:
        return limits.high == math.inf and value > 0
    return value in limits
