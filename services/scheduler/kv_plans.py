"""How a worker could come by the KV of a job's prompt, and how long each way would take.

It computes what it does not have; or first fetches what another holder has; or has a prefill worker compute. Times are
in seconds until the prompt is computed, from what workers report of themselves: rough, but the ways differ by much.
Pure: what is made here is never changed. Credits, Candidate and KvPlan are not frozen all the same: it takes three
times as long to make one that is, and each placement makes a dozen.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

from services.scheduler.index import HolderKey

SEQUENCE_TOKENS = 32
"""What a running sequence weighs in prompt tokens. It takes a row in each step in which the prompt is computed, and a
batch of decodes costs a step about as much as a few dozen prompt tokens."""
TRANSFER_BYTES_PER_S = 400e6
"""What a fetch moves through gRPC on one machine (`make bench-kv`); a network of 10 Gbit/s gives more."""
FETCH_S = 0.01
"""What asking another process costs beside the bytes."""
DECODE_ROLE_FACTOR = 4.0
"""By how much a prompt that a decode worker computes itself counts as longer: its running sequences wait meanwhile."""
LISTED_HOLDERS = 8
"""Holders of most of a prompt that are weighed, in a fleet of any size."""
MOST_SOURCES = 2
"""Holders named to the worker: the best, and one more in case it fails."""

Role = Literal["both", "prefill", "decode"]


@dataclass(slots=True)
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
    deterministic: bool = False
    """Only deterministic workers may run it."""
    kv_format: str = ""
    """If not empty, only workers of this one."""
    alone: bool = False
    """Only an idle worker may run it, and computes the prompt itself: it may be what killed its workers before."""
    failed: bool = False
    """It failed on a worker, and may fail on the next: it is no good probe."""

    def accepts(self, worker: "Candidate") -> bool:
        """Whether the worker is of the kind that may run it."""
        return (worker.deterministic or not self.deterministic) and self.kv_format in ("", worker.kv_format)


@dataclass(slots=True)
class Candidate:
    """A worker of the job's model, as this scheduler sees it now."""

    id: str
    incarnation: str
    kv_format: str
    block_size: int
    block_bytes: int
    max_sequences: int
    total_blocks: int
    healthy: bool
    role: Role
    credits: Credits
    """What is left of the last grant after the placements that it does not reflect yet."""
    free_blocks: int
    """Of the whole worker, whoever they are granted to; less one for each sequence and what is on its way."""
    sequences: int
    """Running, waiting and on their way."""
    pending_prefill_tokens: int
    """Prompt tokens to compute of all sequences there and on their way."""
    prefill_tokens_per_s: float
    deterministic: bool = False
    probe: bool = False
    """Its breaker is half-open: if it is healthy, it may have one job, which shows whether it still fails."""
    lone: bool = False
    """It runs, or is about to run, a job that has to be alone."""

    @property
    def key(self) -> HolderKey:
        return self.id, self.incarnation

    @property
    def idle(self) -> bool:
        return not self.sequences and not self.pending_prefill_tokens

    @property
    def room(self) -> int:
        """How many more sequences it could take."""
        has_blocks = self.credits.blocks > 0 or not self.sequences
        has_prefill = self.credits.prefill_tokens > 0 or not self.pending_prefill_tokens
        sequences = max(0, self.credits.sequences) if self.healthy and has_blocks and has_prefill else 0
        return min(1, sequences) if self.probe else sequences

    def blocks_for(self, job: JobShape) -> int:
        """Blocks of the job's prompt."""
        return -(-job.prompt_tokens // self.block_size)

    def seconds(self, tokens: float) -> float:
        """How long it computes so many prompt tokens."""
        return tokens / self.prefill_tokens_per_s

    def busy_s(self) -> float:
        """How long a prompt waits here, or is slowed down, by what there is to do already."""
        return self.seconds(self.pending_prefill_tokens + SEQUENCE_TOKENS * self.sequences)


class MatchView(Protocol):
    """How many leading blocks of a prompt each holder of one KV format has."""

    def blocks(self, key: HolderKey) -> int: ...

    def best(self, count: int) -> Sequence[tuple[HolderKey, int]]:
        """Those that have most, in falling order."""


class Held:
    """A match, and its best holders."""

    def __init__(self, match: MatchView) -> None:
        self.blocks = match.blocks
        self.best = match.best(LISTED_HOLDERS)


@dataclass(frozen=True, slots=True)
class Prefill:
    """A worker that computes the prompt for another one, and what that takes of it."""

    worker: Candidate
    cost: Credits
    blocks: int


@dataclass(slots=True)
class KvPlan:
    """One way."""

    hit_tokens: int
    """Leading prompt tokens that need not be computed for this job, anywhere."""
    compute_tokens: int
    """Prompt tokens that the worker computes itself; at least one, whose logits choose the first output token."""
    seconds: float
    holders: tuple[tuple[HolderKey, int], ...] = ()
    """Whom to fetch from, the best first, and how many leading blocks each has."""
    prefill: Prefill | None = None


def plans(job: JobShape, worker: Candidate, held: Held, prefillers: Iterable[Candidate]) -> Iterator[KvPlan]:
    """All ways worth a thought. `held`: of the worker's KV format."""
    full_blocks = max(0, job.prompt_tokens - 1) // worker.block_size  # the last token is always computed
    own = min(held.blocks(worker.key), full_blocks)
    yield _computed(job, worker, own)
    others = ((key, min(blocks, full_blocks)) for key, blocks in held.best if key[0] != worker.id)
    holders = tuple(islice((other for other in others if other[1] > own), MOST_SOURCES))
    if holders:
        yield _fetched(job, worker, own, holders)
    for prefiller in prefillers:
        if prefiller.id != worker.id and prefiller.kv_format == worker.kv_format and full_blocks > own:
            theirs = min(held.blocks(prefiller.key), full_blocks)
            if (plan := _prefilled(job, worker, own, prefiller, theirs, full_blocks)) is not None:
                yield plan


def _computed(job: JobShape, worker: Candidate, have: int) -> KvPlan:
    hit_tokens = have * worker.block_size
    compute = job.prompt_tokens - hit_tokens
    return KvPlan(hit_tokens, compute, _own_compute_s(worker, compute))


def _fetched(job: JobShape, worker: Candidate, own: int, holders: tuple[tuple[HolderKey, int], ...]) -> KvPlan:
    _, best = holders[0]
    hit_tokens = best * worker.block_size
    compute = job.prompt_tokens - hit_tokens
    seconds = FETCH_S + _transfer_s(worker, best - own) + _own_compute_s(worker, compute)
    return KvPlan(hit_tokens, compute, seconds, holders=holders)


def _prefilled(
    job: JobShape, worker: Candidate, own: int, prefiller: Candidate, theirs: int, full_blocks: int
) -> KvPlan | None:
    remote_tokens = job.prompt_tokens - theirs * worker.block_size
    cost = Credits(1, prefiller.blocks_for(job), remote_tokens)
    if not prefiller.healthy or prefiller.probe or not takes(prefiller, cost):
        return None
    compute = job.prompt_tokens - full_blocks * worker.block_size
    # Blocks travel while the next ones are computed, so that at most the slower of the two counts.
    remote_s = prefiller.busy_s() + max(prefiller.seconds(remote_tokens), _transfer_s(worker, full_blocks - own))
    seconds = FETCH_S + remote_s + worker.seconds(compute)
    hit_tokens = max(own, theirs) * worker.block_size
    return KvPlan(hit_tokens, compute, seconds, prefill=Prefill(prefiller, cost, full_blocks))


def takes(worker: Candidate, cost: Credits) -> bool:
    """Whether a worker's credits cover what a placement costs it. An idle one takes a prompt of any length."""
    credits = worker.credits
    has_prefill = cost.prefill_tokens <= credits.prefill_tokens or not worker.pending_prefill_tokens
    return cost.sequences <= credits.sequences and cost.blocks <= credits.blocks and has_prefill


def _own_compute_s(worker: Candidate, tokens: int) -> float:
    """A decode worker computes what is short; what is long is for others, if there are any."""
    extra = (DECODE_ROLE_FACTOR - 1) * max(0, tokens - worker.block_size) if worker.role == "decode" else 0
    return worker.seconds(tokens + extra)


def _transfer_s(worker: Candidate, blocks: int) -> float:
    return blocks * worker.block_bytes / TRANSFER_BYTES_PER_S
