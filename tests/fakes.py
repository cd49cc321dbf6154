"""Stand-ins for slow parts, that fail where the real part would fail."""

import struct
from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from services.worker.engine.batcher import Batch
from services.worker.engine.sampling import sample
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams

_MODULUS = 2**61 - 1
_UNWRITTEN = -1


class FakeRunner:
    """A toy model whose next token is a pure function of all tokens before, as read through the block table.

    Like a transformer's, the KV of a position depends on that token and on the KV of all positions before it. So a
    wrong block table, KV that was never computed, a block given to two, or a write into a shared block changes tokens.
    `expected_tokens` computes the same function without blocks.
    """

    def __init__(self, num_blocks: int, block_size: int, vocabulary_size: int = 31) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocabulary_size = vocabulary_size
        self.batches: list[list[tuple[int, int]]] = []  # (start, length) of the slices of each forward
        self.fail_next: Exception | None = None  # raised once, after KV was written
        self._kv = [[_UNWRITTEN] * block_size for _ in range(num_blocks)]

    def forward(self, batch: Batch) -> Tensor:
        assert batch.slices, "a forward computes something"
        self.batches.append([(piece.start, piece.length) for piece in batch.slices])
        for piece in batch.slices:
            sequence = piece.sequence
            state = _fold(self._read(sequence, position) for position in range(piece.start))
            for position, token in enumerate(piece.tokens, start=piece.start):
                value = _value(state, token)
                block, offset = self._slot(sequence, position)
                self._kv[block][offset] = value
                state = _fold([value], state)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        rows = [
            self._logits_of(piece.sequence, piece.start + piece.length - row)
            for piece in batch.slices
            for row in range(piece.sampled_rows - 1, -1, -1)
        ]
        return torch.stack(rows) if rows else torch.empty(0, self.vocabulary_size)

    def read_block(self, block: int) -> bytes:
        return struct.pack(f"<{self.block_size}q", *self._kv[block])

    def write_block(self, block: int, data: bytes | memoryview) -> None:
        if len(data) != 8 * self.block_size:
            raise ValueError(f"a block has {8 * self.block_size} bytes, not {len(data)}")
        self._kv[block] = list(struct.unpack(f"<{self.block_size}q", data))

    def expected_tokens(self, sequence: Sequence) -> list[int]:
        """All tokens, prompt and output, that a fresh sequence like this one ends with when nothing goes wrong."""
        alone = Sequence(
            key=None,
            tokens=list(sequence.tokens),
            prompt_length=sequence.prompt_length,
            sampling=sequence.sampling,
            stop=sequence.stop,
            choice=sequence.choice,
        )
        state = 0
        for token in alone.tokens:
            state = _fold([_value(state, token)], state)
        while alone.finish is None:
            [token] = sample(self._logits(state).unsqueeze(0), [alone])
            alone.append(token)
            state = _fold([_value(state, token)], state)
        return alone.tokens

    def logits_after(self, tokens: Iterable[int]) -> Tensor:
        """The row that a sequence of these tokens draws its next one from."""
        state = 0
        for token in tokens:
            state = _fold([_value(state, token)], state)
        return self._logits(state)

    def _slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.blocks[position // self.block_size], position % self.block_size

    def _read(self, sequence: Sequence, position: int) -> int:
        block, offset = self._slot(sequence, position)
        return self._kv[block][offset]

    def _logits_of(self, sequence: Sequence, length: int) -> Tensor:
        """After so many tokens. Reads the KV again, after all slices wrote theirs."""
        return self._logits(_fold(self._read(sequence, position) for position in range(length)))

    def _logits(self, state: int) -> Tensor:
        scores = [_fold([token], state) % 1000 / 200 for token in range(self.vocabulary_size)]
        return torch.tensor(scores, dtype=torch.float32)


def make_sequence(
    key: Hashable,
    prompt: list[int],
    max_tokens: int = 8,
    sampling: SamplingParams | None = None,
    stop_token_ids: frozenset[int] = frozenset(),
    choice: int = 0,
    leader: Sequence | None = None,
    cache_root: bytes = b"root",
) -> Sequence:
    """A sequence with defaults for all that a test does not care about; greedy."""
    return Sequence(
        key=key,
        tokens=list(prompt),
        prompt_length=len(prompt),
        sampling=sampling or SamplingParams(temperature=0.0),
        stop=StopParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids),
        choice=choice,
        leader=leader,
        cache_root=cache_root,
    )


def _fold(values: Iterable[int], state: int = 0) -> int:
    for value in values:
        state = (state * 1_000_003 + value + 12_345) % _MODULUS
    return state


def _value(state: int, token: int) -> int:
    return (state * 31 + token * 7_919 + 1) % _MODULUS
