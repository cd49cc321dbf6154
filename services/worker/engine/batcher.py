"""Decides which tokens of which sequences the next step computes.

Moves sequences between waiting and running and gives them blocks; knows nothing of tensors, of how tokens are
sampled, or of why a sequence ends.
"""

import time
from collections import deque
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import chain, takewhile

from services.worker.engine.batching_policy import BatchingPolicy
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.counters import EngineCounters
from services.worker.engine.sequence import Sequence
from services.worker.engine.speculative import PromptLookup


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens [start, start + length) of one sequence, computed in this step; the last ones may be drafts.

    All blocks for positions below start + length are allocated. `samples` when the slice reaches the sequence's last
    token, so that its logits give the next one, and a draft's the one after it.
    """

    sequence: Sequence
    start: int
    length: int
    drafts: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.start + self.length], *self.drafts]

    @property
    def drafts_start(self) -> int:
        """The position of the first draft; where there is none, the slice's end."""
        return self.start + self.length - len(self.drafts)

    @property
    def samples(self) -> bool:
        return self.drafts_start == len(self.sequence.tokens)

    @property
    def sampled_rows(self) -> int:
        """How many of its rows' logits are wanted, from its last row backwards."""
        return 1 + len(self.drafts) if self.samples else 0

    @property
    def right_drafts(self) -> int:
        """How many of its drafts, from the first, the sequence has got as tokens since, and another one after them."""
        if not self.drafts:
            return 0
        since = self.sequence.tokens[self.drafts_start : self.start + self.length + 1]
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.drafts, since[:-1], strict=False)))

    @property
    def is_decode(self) -> bool:
        """It computes one output token and drafts; what is more, or of the prompt, is prefill."""
        return self.drafts_start - self.start == 1 and self.start >= self.sequence.prompt_length


@dataclass(frozen=True, slots=True)
class Batch:
    """The slices of one step: at most one per sequence, those that compute one token (decodes), and drafts, first."""

    slices: tuple[Slice, ...]


class Batcher:
    """Iteration-level batching: decodes first, then prefill in chunks, then admissions, within a token budget.

    A sequence gets blocks for all its tokens when it is admitted, and one more whenever a decode needs it. When there
    is none left, the newest running sequence is preempted: it loses its blocks and waits, first in line, to have its
    tokens computed again. So the oldest running sequence always gets on, since the pool can hold any one sequence.

    Where a step only decodes, and `speculative_rows` are at least two for each sequence, the others are for drafts.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        max_batch_tokens: int,
        policy: BatchingPolicy,
        speculative_rows: int = 0,
    ) -> None:
        if max_sequences < 1:
            raise ValueError(f"max_sequences must be at least 1, got {max_sequences}")
        if max_batch_tokens < max_sequences:
            raise ValueError(
                f"max_batch_tokens {max_batch_tokens} must be at least max_sequences {max_sequences}: "
                "each running sequence takes one token a step"
            )
        self.counters = EngineCounters()
        self._pool = pool
        self._max_sequences = max_sequences
        self._max_batch_tokens = max_batch_tokens
        self._policy = policy
        self._speculative_rows = min(speculative_rows, max_batch_tokens)
        self._sequences: dict[Hashable, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of admission, oldest first

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def pending_prefill_tokens(self) -> int:
        """Tokens to compute before all sequences decode; what the pool may have of waiting ones is not deducted."""
        waiting = sum(sequence.uncomputed for sequence in self._waiting)
        return waiting + sum(sequence.uncomputed for sequence in self._running if sequence.uncomputed > 1)

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of the line."""
        if sequence.key in self._sequences:
            raise ValueError(f"there is a sequence {sequence.key} already")
        self._sequences[sequence.key] = sequence
        self._waiting.append(sequence)

    def remove(self, key: Hashable) -> bool:
        """Frees a sequence, finished or not, wherever it is; False if there is none of that key."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return False
        if sequence.blocks:
            self._running.remove(sequence)
            self._release_blocks(sequence)
        else:
            self._waiting.remove(sequence)
            self._release_held(sequence)
        return True

    def form_batch(self) -> Batch:
        """The next step's slices; empty when the policy lets nobody run yet. Until `commit`, nothing is computed."""
        slices = self._decode_slices()
        self._policy.update(self._waiting, self._running)
        budget = self._max_batch_tokens - len(slices)
        prefilling = [sequence for sequence in self._running if sequence.uncomputed > 1]
        candidates = chain(prefilling, self._admit_in_order())
        while budget and (sequence := next(candidates, None)):
            length = min(budget, sequence.uncomputed)
            slices.append(self._slice(sequence, length))
            budget -= length
        slices.sort(key=lambda piece: piece.length > 1)
        if slices and len(slices) < self._speculative_rows and all(piece.is_decode for piece in slices):
            slices = self._with_drafts(slices)
        return Batch(tuple(slices))

    def commit(self, batch: Batch) -> None:
        """Records that the KV of a batch's slices is computed; blocks that became full are now shareable.

        What was computed for drafts holds as far as the sequence has got just these tokens since.
        """
        block_size = self._pool.block_size
        for piece in batch.slices:
            sequence = piece.sequence
            right = piece.right_drafts
            sequence.computed = piece.drafts_start + right
            self._count_slice(piece, right)
            full_blocks = sequence.computed // block_size
            sequence.hash_blocks(full_blocks, block_size)
            for index in range(piece.start // block_size, full_blocks):
                self._pool.name(sequence.blocks[index], sequence.hashes[index])

    def _decode_slices(self) -> list[Slice]:
        slices: list[Slice] = []
        for sequence in self._running:  # preemption takes from the end of this very list, which ends the loop earlier
            if sequence.uncomputed == 1 and self._grow(sequence):
                slices.append(self._slice(sequence, 1))
        return slices

    def _grow(self, sequence: Sequence) -> bool:
        """Gives a running sequence the blocks it lacks, at the newest one's cost; False if it is itself the newest."""
        lacking = self._pool.blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        if lacking <= 0:
            return True
        while (blocks := self._allocate(lacking)) is None:
            newest = self._running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        sequence.blocks += blocks
        return True

    def _with_drafts(self, decodes: list[Slice]) -> list[Slice]:
        """The same slices, each with drafts for an equal share of the rows that are left."""
        share = self._speculative_rows // len(decodes) - 1
        return [self._with_draft(piece, share) for piece in decodes] if share else decodes

    def _with_draft(self, piece: Slice, most: int) -> Slice:
        sequence = piece.sequence
        if sequence.lookup is None:
            sequence.lookup = PromptLookup(self._speculative_rows - 1)
        # The last token is drawn whatever was guessed.
        draft = sequence.lookup.draft(sequence.tokens, min(most, sequence.max_length - len(sequence.tokens) - 1))
        lacking = self._pool.blocks_for(len(sequence.tokens) + len(draft)) - len(sequence.blocks)
        if lacking > 0:
            fresh = self._pool.allocate(lacking, keep_free=len(self._running))
            sequence.blocks += fresh or ()
            draft = draft[: len(sequence.blocks) * self._pool.block_size - len(sequence.tokens)]
        return Slice(sequence, piece.start, 1 + len(draft), tuple(draft)) if draft else piece

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release_blocks(sequence)
        self._waiting.appendleft(sequence)
        sequence.preemptions += 1
        self.counters.preemptions += 1

    def _admit_in_order(self) -> Iterator[Sequence]:
        """Admits the next waiting sequence each time it is asked for one, until one must wait."""
        index = 0
        while index < len(self._waiting) and len(self._running) < self._max_sequences:
            sequence = self._waiting[index]
            if self._waits_for_leader(sequence):
                index += 1  # those behind it need not wait with it
                continue
            if not self._policy.admits(sequence) or not self._admit(sequence):
                return
            del self._waiting[index]
            yield sequence

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        leader = sequence.leader
        if leader is None or self._sequences.get(leader.key) is not leader:
            return False
        shareable = (leader.prompt_length - 1) // self._pool.block_size * self._pool.block_size
        return leader.computed < shareable

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence all blocks for its tokens, those that the pool has of them shared.

        The last token is always computed, since its logits are needed. Every running sequence keeps a free block in
        reach, so that a newcomer is not preempted at the next block boundary.
        """
        length, block_size = len(sequence.tokens), self._pool.block_size
        shareable = (length - 1) // block_size
        sequence.hash_blocks(shareable, block_size)
        shared = self._pool.match(sequence.hashes[:shareable])
        fresh = self._pool.blocks_for(length) - len(shared)
        blocks = self._allocate(fresh, shared, keep_free=len(self._running))
        if blocks is None:
            return False
        self._release_held(sequence)
        sequence.blocks = blocks
        sequence.computed = len(shared) * block_size
        sequence.leader = None
        self._running.append(sequence)
        if not sequence.preemptions:
            sequence.admitted_at = time.monotonic()
            sequence.cached_tokens = min(sequence.computed, sequence.prompt_length)
            self.counters.prefix_queried_tokens += sequence.prompt_length
            self.counters.prefix_hit_tokens += sequence.cached_tokens
        return True

    def _allocate(self, count: int, shared: Items[int] = (), keep_free: int = 0) -> list[int] | None:
        """Blocks of the pool; if need be what is kept for waiting sequences is given up, the last in line's first."""
        while (blocks := self._pool.allocate(count, shared, keep_free)) is None:
            keeper = next((sequence for sequence in reversed(self._waiting) if sequence.held), None)
            if keeper is None:
                return None
            self._release_held(keeper)
        return blocks

    def _release_held(self, sequence: Sequence) -> None:
        self._pool.free(sequence.held)
        sequence.held = []

    def _release_blocks(self, sequence: Sequence) -> None:
        self._pool.free(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0

    def _slice(self, sequence: Sequence, length: int) -> Slice:
        first_block = sequence.blocks[sequence.computed // self._pool.block_size]
        assert self._pool.is_private(first_block), "a shared block is never written"
        return Slice(sequence, sequence.computed, length)

    def _count_slice(self, piece: Slice, right: int) -> None:
        """`right`: of the drafts in it."""
        if piece.is_decode:
            self.counters.decode_tokens += 1 + right
            if piece.drafts and piece.sequence.lookup is not None:
                piece.sequence.lookup.learn(len(piece.drafts), right)
                self.counters.draft_tokens += len(piece.drafts)
                self.counters.accepted_tokens += right
        else:
            self.counters.prefill_tokens += piece.length
            self.counters.prefill_chunks += 1
