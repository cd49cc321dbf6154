"""The state of one output: its tokens, its blocks, and how far its KV is computed.

Knows nothing of tensors, of other sequences, or of who asked. The batcher and the engine move it along; it checks
at birth and at each append that it is still possible.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

from services.common.block_hash import block_hash
from services.worker.engine.speculative import PromptLookup


class Finish(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Defaults keep the model's own distribution; temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    seed: int = 0  # 64 bits; draws are keyed by (seed, choice, absolute position)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit), each id once
    logprobs: int | None = None  # report each token's, and those of so many of the likeliest; None: report none
    penalized: bool = field(init=False)
    adjusts: bool = field(init=False)  # logits are changed before they are filtered

    def __post_init__(self) -> None:
        penalized = bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)
        object.__setattr__(self, "penalized", penalized)
        object.__setattr__(self, "adjusts", penalized or bool(self.logit_bias))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class StopParams:
    """When a sequence ends. `stop_token_ids` holds the model's end-of-sequence ids too, unless they are ignored."""

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(slots=True, eq=False)
class Sequence:
    """One output of one request.

    `tokens` is the prompt followed by the output; output ids that the client already has (a resumed attempt) stand
    in `tokens` from the start. `computed` counts the leading tokens whose KV lies in `blocks`; the last token's KV is
    never computed before it is needed to produce the next one, so a decoding sequence has computed == len(tokens) - 1.
    """

    key: Hashable  # the caller's name for it, never looked into
    tokens: list[int]
    prompt_length: int
    sampling: SamplingParams
    stop: StopParams
    choice: int = 0
    cache_root: bytes = b""  # root of its chain hashes: sequences share blocks only under one root
    leader: "Sequence | None" = None  # choice 0 of the same request: its prompt blocks are shared, so it goes first
    blocks: list[int] = field(default_factory=list)  # block table: ids in the block pool, in order of position
    held: list[int] = field(default_factory=list)  # while it waits: blocks of its prefix that are kept for it
    hashes: list[bytes] = field(default_factory=list)  # chain hashes of its leading full blocks, as far as asked for
    lookup: PromptLookup | None = None  # where its drafts come from, once it gets any
    computed: int = 0
    cached_tokens: int = 0  # leading prompt tokens whose KV was found in the pool at first admission
    admitted_at: float = 0.0  # when it first got blocks, in seconds of the monotonic clock
    preemptions: int = 0
    prefill_ns: int = 0  # its shares of the steps that it was in: see step_shares.py
    decode_ns: int = 0
    finish: Finish | None = None
    delivered: int = field(init=False)  # output tokens that it was born with
    # Token id -> how often it is in the output; a token of the prompt alone has 0. Kept for penalized sequences only.
    occurrences: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        if not 0 < self.prompt_length <= len(self.tokens):
            raise ValueError(f"prompt_length {self.prompt_length} must lie between 1 and {len(self.tokens)} tokens")
        if self.output_length >= self.stop.max_tokens:
            raise ValueError(
                f"{self.output_length} delivered tokens leave nothing of max_tokens {self.stop.max_tokens}"
            )
        self.delivered = self.output_length
        self.occurrences = {}
        if self.sampling.penalized:
            self.occurrences = dict.fromkeys(self.tokens[: self.prompt_length], 0)
            for token in self.tokens[self.prompt_length :]:
                self._count(token)

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def max_length(self) -> int:
        """Tokens it has if it runs until max_tokens."""
        return self.prompt_length + self.stop.max_tokens

    @property
    def uncomputed(self) -> int:
        """Tokens whose KV must still be computed before the next one can be sampled; 1 while decoding."""
        return len(self.tokens) - self.computed

    def append(self, token: int) -> None:
        """Takes a sampled token and decides whether it is the last one."""
        assert self.finish is None, "a finished sequence takes no more tokens"
        self.tokens.append(token)
        if self.sampling.penalized:
            self._count(token)
        if token in self.stop.stop_token_ids and self.output_length > self.stop.min_tokens:
            self.finish = Finish.STOP
        elif self.output_length >= self.stop.max_tokens:
            self.finish = Finish.LENGTH

    def hash_blocks(self, count: int, block_size: int) -> None:
        """Extends `hashes` to the first `count` blocks, all full. Tokens never change, so each is hashed once."""
        assert count * block_size <= len(self.tokens), "only full blocks have a name"
        for index in range(len(self.hashes), count):
            parent = self.hashes[-1] if self.hashes else self.cache_root
            self.hashes.append(block_hash(parent, self.tokens[index * block_size : (index + 1) * block_size]))

    def _count(self, token: int) -> None:
        self.occurrences[token] = self.occurrences.get(token, 0) + 1
