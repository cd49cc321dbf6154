"""Which worker a job goes to: a pure function of the job, the workers' state and the block index.

A worker can take a job when its remaining credits cover what the job needs:

    sequences       one per choice
    blocks          those of the prompt, shared by all choices, and one more per choice to write into. Not those of
                    max_tokens: most answers end long before, and a worker that runs out preempts.
    prefill tokens  prompt tokens that are still to be computed after its prefix hits

A credit is only this scheduler's share of a worker, and a job may be larger than any share. So that it does not starve,
a worker on which no prefill waits takes a prompt of any length, an idle worker any job that fits it at all, and a job
that has waited long (`beyond_share`) goes where all that is free would do, whosever it is; the worker may answer busy.

Among the workers that can take the job the lowest cost wins, in tokens:

    cost = prompt tokens to compute + prompt tokens already waiting + SEQUENCE_TOKENS * sequences

so a prefix hit draws a job to its worker until that worker's queue is longer than what the hit saves. The form is that
of Dynamo's KV router (overlap against load); the units are ours. Equal costs go to the worker with fewer sequences,
then by a hash of request and worker, which spreads ties evenly and needs no state.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, Protocol

from services.scheduler.index import HolderKey

SEQUENCE_TOKENS = 32
"""What a running sequence weighs in prompt tokens. It takes a row in each step in which the prompt is computed, and a
batch of decodes costs a step about as much as a few dozen prompt tokens."""


@dataclass(frozen=True, slots=True)
class Credits:
    """What a worker has for this scheduler, or what a placement takes of it."""

    sequences: int = 0
    blocks: int = 0
    prefill_tokens: int = 0

    def __add__(self, other: "Credits") -> "Credits":
        return Credits(
            self.sequences + other.sequences,
            self.blocks + other.blocks,
            self.prefill_tokens + other.prefill_tokens,
        )

    def __sub__(self, other: "Credits") -> "Credits":
        return Credits(
            self.sequences - other.sequences,
            self.blocks - other.blocks,
            self.prefill_tokens - other.prefill_tokens,
        )


@dataclass(frozen=True, slots=True)
class JobShape:
    """What placement needs to know of a job. `block_hashes`: chain hashes of the prompt's full blocks."""

    request_id: str
    prompt_tokens: int
    choices: int
    block_hashes: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker of the job's model, as this scheduler sees it now."""

    id: str
    incarnation: str
    kv_format: str
    block_size: int
    max_sequences: int
    total_blocks: int
    healthy: bool
    prefill_only: bool
    """Decodes only when no other worker can (role `prefill`)."""
    credits: Credits
    """What is left of the last grant after the placements that it does not reflect yet."""
    free_blocks: int
    """Of the whole worker, whoever they are granted to; less one for each sequence and what is on its way."""
    sequences: int
    """Running, waiting and on their way."""
    pending_prefill_tokens: int
    """Prompt tokens to compute of all sequences there and on their way."""

    @property
    def room(self) -> int:
        """How many more sequences it could take."""
        has_blocks = self.credits.blocks > 0 or not self.sequences
        has_prefill = self.credits.prefill_tokens > 0 or not self.pending_prefill_tokens
        return max(0, self.credits.sequences) if self.healthy and has_blocks and has_prefill else 0


@dataclass(frozen=True, slots=True)
class Choice:
    """The worker that was chosen and what the placement costs it."""

    worker: Candidate
    cost: Credits
    expected_hit_tokens: int
    reason: Literal["prefix_hit", "least_loaded"]


class IndexView(Protocol):
    """What placement asks of the block index."""

    def match(self, kv_format: str, hashes: Sequence[bytes]) -> Mapping[HolderKey, int]: ...


def place(
    job: JobShape, candidates: Iterable[Candidate], index: IndexView, *, avoid: str = "", beyond_share: bool = False
) -> Choice | None:
    """The best worker for the job, or None while no worker can take it. `avoid` is taken only if no other can.

    `beyond_share`: what is free on a worker counts even where it is granted to another scheduler.
    """
    roomy = [worker for worker in candidates if worker.healthy and (beyond_share or worker.credits.sequences > 0)]
    matches = {kv_format: index.match(kv_format, job.block_hashes) for kv_format in {w.kv_format for w in roomy}}
    choices = [_choice(job, worker, matches[worker.kv_format]) for worker in roomy]
    return min(
        (choice for choice in choices if _can_take(choice.worker, job, choice.cost, beyond_share)),
        key=lambda choice: _preference(job, choice, avoid),
        default=None,
    )


def impossible(job: JobShape, candidates: Sequence[Candidate]) -> str | None:
    """Why none of these workers could run the job even when idle, in one sentence; None if one could."""
    if not candidates or any(_fits_idle(worker, job) for worker in candidates):
        return None
    largest = max(candidates, key=lambda worker: (worker.max_sequences, worker.total_blocks))
    return (
        f"{job.choices} choices of a prompt of {job.prompt_tokens} tokens fit no connected worker: "
        f"the largest runs {largest.max_sequences} sequences in {largest.total_blocks * largest.block_size} tokens."
    )


def _choice(job: JobShape, worker: Candidate, matches: Mapping[HolderKey, int]) -> Choice:
    # The last prompt token is always computed, since its logits choose the first output token.
    usable_blocks = min(
        matches.get((worker.id, worker.incarnation), 0), max(0, job.prompt_tokens - 1) // worker.block_size
    )
    hit_tokens = usable_blocks * worker.block_size
    reason: Literal["prefix_hit", "least_loaded"] = "prefix_hit" if hit_tokens else "least_loaded"
    return Choice(worker, _cost(job, worker, hit_tokens), hit_tokens, reason)


def _cost(job: JobShape, worker: Candidate, hit_tokens: int) -> Credits:
    return Credits(job.choices, _prompt_blocks(job, worker) + job.choices, job.prompt_tokens - hit_tokens)


def _prompt_blocks(job: JobShape, worker: Candidate) -> int:
    return -(-job.prompt_tokens // worker.block_size)


def _can_take(worker: Candidate, job: JobShape, cost: Credits, beyond_share: bool) -> bool:
    idle = not worker.sequences and not worker.pending_prefill_tokens
    if idle and _fits_idle(worker, job):
        return True
    if beyond_share and _fits_free(worker, cost):
        return True
    credits = worker.credits
    has_prefill = cost.prefill_tokens <= credits.prefill_tokens or not worker.pending_prefill_tokens
    return cost.sequences <= credits.sequences and cost.blocks <= credits.blocks and has_prefill


def _fits_idle(worker: Candidate, job: JobShape) -> bool:
    """Whether it could run alone. Its prompt alone must fit: choices for which no block is left take turns."""
    return job.choices <= worker.max_sequences and _prompt_blocks(job, worker) <= worker.total_blocks


def _fits_free(worker: Candidate, cost: Credits) -> bool:
    """Whether it fits what is free of the whole worker. One that takes on prompt tokens at all takes any number."""
    takes_prefill = worker.credits.prefill_tokens > 0 or not worker.pending_prefill_tokens
    free_sequences = worker.max_sequences - worker.sequences
    return cost.sequences <= free_sequences and cost.blocks <= worker.free_blocks and takes_prefill


def _preference(job: JobShape, choice: Choice, avoid: str) -> tuple[bool, bool, int, int, bytes]:
    """Sorts the workers that can take a job, the best first."""
    worker = choice.worker
    tokens = choice.cost.prefill_tokens + worker.pending_prefill_tokens + SEQUENCE_TOKENS * worker.sequences
    tie = blake2b(f"{job.request_id}\0{worker.id}".encode(), digest_size=8).digest()
    return worker.id == avoid, worker.prefill_only, tokens, worker.sequences, tie
