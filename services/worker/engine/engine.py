"""The engine: takes sequences in and turns them, step by step, into tokens. Read this first.

A step is one sentence: form the batch, run the model on it, sample, commit. The batcher decides what runs, the block
pool where its KV lies, the runner computes, `sampling` draws. Knows no clients, no text, no network; not thread-safe,
one thread calls it.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from services.worker.engine.batcher import Batch, Batcher, Slice
from services.worker.engine.block_exchange import BlockExchange, BlockMemory, PublishedBlocks
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.counters import EngineCounters
from services.worker.engine.logprobs import TokenLogprobs, token_logprobs
from services.worker.engine.sampling import sample
from services.worker.engine.sequence import Sequence


class Runner(BlockMemory, Protocol):
    """Runs the model, over the blocks' memory."""

    def forward(self, batch: Batch) -> Tensor:
        """Computes the KV of all slices into their blocks.

        Returns float32 logits [rows that sample, vocabulary], in the order of the slices; in a slice, those of its last
        token and then of its drafts.
        """


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step's new tokens. A sequence's stand one after the other."""

    tokens: list[tuple[Sequence, int]]
    logprobs: list[tuple[Sequence, TokenLogprobs]]


Forward = Callable[[Batch], Tensor]
Draw = Callable[[Tensor, Batch], Drawn]


class StepWatcher(Protocol):
    """Goes around the two long parts of each step."""

    def forward(self, forward: Forward) -> Forward: ...

    def draw(self, draw: Draw) -> Draw: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step produced."""

    tokens: list[tuple[Sequence, int]]  # new tokens; if a sequence has several, they are in order
    logprobs: list[tuple[Sequence, TokenLogprobs]]  # of the tokens of those sequences that ask for them, in that order
    started: list[Sequence]  # their first token is among `tokens`
    finished: list[Sequence]  # their last token is among `tokens`; `finish` says why
    block_events: PublishedBlocks
    slices: tuple[Slice, ...]  # what was computed; empty: nothing could run, since a static batch is still filling
    computed_tokens: int


class Engine:
    """`add` and `cancel` sequences between steps; call `step` while `has_work`.

    One thread does all this; others may use `exchange` at any time.
    """

    def __init__(self, runner: Runner, pool: BlockPool, batcher: Batcher, *, max_context: int) -> None:
        if pool.num_blocks * pool.block_size < max_context:
            raise ValueError(
                f"the KV block pool holds {pool.num_blocks} blocks of {pool.block_size} tokens, too few for one "
                f"sequence of the full context of {max_context} tokens: it takes {pool.blocks_for(max_context)} blocks"
            )
        self.exchange = BlockExchange(pool, runner)
        self._runner = runner
        self._pool = pool
        self._batcher = batcher
        self._max_context = max_context
        self._reporting: set[Hashable] = set()  # keys of the sequences that ask for log-probabilities
        self.watch(None)

    @property
    def counters(self) -> EngineCounters:
        return self._batcher.counters

    @property
    def has_work(self) -> bool:
        return self.num_running + self.num_waiting > 0

    @property
    def num_running(self) -> int:
        return self._batcher.num_running

    @property
    def num_waiting(self) -> int:
        return self._batcher.num_waiting

    @property
    def pending_prefill_tokens(self) -> int:
        return self._batcher.pending_prefill_tokens

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence. ValueError if it could outgrow the context or its key is taken."""
        if sequence.max_length > self._max_context:
            raise ValueError(
                f"prompt of {sequence.prompt_length} and max_tokens of {sequence.stop.max_tokens} tokens exceed the "
                f"context of {self._max_context}"
            )
        self._batcher.add(sequence)
        if sequence.sampling.logprobs is not None:
            self._reporting.add(sequence.key)

    def cancel(self, key: Hashable) -> bool:
        """Drops a sequence and frees its blocks; False if there is none of that key (it may have finished)."""
        with self.exchange.lock:
            return self._remove(key)

    def watch(self, watcher: StepWatcher | None) -> None:
        """Has a watcher go around the parts of the steps from now on; None: nothing does, at no cost."""
        self._forward: Forward = self._runner.forward if watcher is None else watcher.forward(self._runner.forward)
        self._draw: Draw = self._draw_tokens if watcher is None else watcher.draw(self._draw_tokens)

    def step(self) -> StepResult:
        """One turn. If the model fails, its error comes through and no sequence has moved: cancel them or go on.

        If the drawing fails, some may have: cancel them.
        """
        self.counters.steps += 1
        with self.exchange.lock:
            batch = self._batcher.form_batch()
        sampling = [piece.sequence for piece in batch.slices if piece.samples]
        started = [sequence for sequence in sampling if sequence.output_length == sequence.delivered]
        drawn = self._draw(self._forward(batch), batch) if batch.slices else Drawn([], [])
        finished = [sequence for sequence in sampling if sequence.finish is not None]
        self._commit(batch, finished)
        return StepResult(
            tokens=drawn.tokens,
            logprobs=drawn.logprobs,
            started=started,
            finished=finished,
            block_events=self.exchange.publish(),
            slices=batch.slices,
            computed_tokens=sum(piece.length for piece in batch.slices),
        )

    def _draw_tokens(self, logits: Tensor, batch: Batch) -> Drawn:
        """Draws each sequence's next token and appends it, and those after it while they are as guessed."""
        first_rows = accumulate((piece.sampled_rows for piece in batch.slices), initial=0)
        pending = [(row, piece) for row, piece in zip(first_rows, batch.slices, strict=False) if piece.samples]
        before = [(piece.sequence, len(piece.sequence.tokens)) for _, piece in pending]
        logprobs: dict[Sequence, list[TokenLogprobs]] = defaultdict(list)
        depth = 0
        while pending:
            sequences = [piece.sequence for _, piece in pending]
            part = _rows(logits, [row + depth for row, _ in pending])
            tokens = sample(part, sequences)
            if self._reporting:
                for sequence, values in token_logprobs(part, sequences, tokens):
                    logprobs[sequence].append(values)
            for sequence, token in zip(sequences, tokens, strict=True):
                sequence.append(token)
            pending = [each for each, token in zip(pending, tokens, strict=True) if _goes_on(each[1], depth, token)]
            depth += 1
        return Drawn(
            [(sequence, token) for sequence, length in before for token in sequence.tokens[length:]],
            [(sequence, values) for sequence, _ in before for values in logprobs.get(sequence, ())],
        )

    def _remove(self, key: Hashable) -> bool:
        self._reporting.discard(key)
        return self._batcher.remove(key)

    def _commit(self, batch: Batch, finished: list[Sequence]) -> None:
        with self.exchange.lock:
            self._batcher.commit(batch)
            for sequence in finished:
                self._remove(sequence.key)


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    """These rows, in ascending order; without a copy if they adjoin."""
    adjoining = rows[-1] - rows[0] == len(rows) - 1
    return logits[rows[0] : rows[-1] + 1] if adjoining else logits[rows]


def _goes_on(piece: Slice, depth: int, token: int) -> bool:
    """Whether the slice's next row was computed for what was drawn now."""
    return depth < len(piece.drafts) and piece.drafts[depth] == token and piece.sequence.finish is None
