"""Which worker a job goes to: a pure function of the job, the workers' state and the block index.

A worker can take a job when its remaining credits cover what the job needs:

    sequences       one per choice
    blocks          those of the prompt, shared by all choices, and one more per choice to write into. Not those of
                    max_tokens: most answers end long before, and a worker that runs out preempts.
    prefill tokens  prompt tokens that it computes itself: not its prefix hits, nor what comes from elsewhere

A credit is only this scheduler's share of a worker, and a job may be larger than any share. So that it does not starve,
a worker on which no prefill waits takes a prompt of any length, an idle worker any job that fits it at all, and a job
that has waited long (`beyond_share`) goes where all that is free would do, whosever it is; the worker may answer busy.

A job that has to be alone needs an idle worker. One worker is kept from other jobs while it waits (`kept`); it takes
another that is idle only while others find room elsewhere, so that jobs like it never hold a whole fleet of several.

Among the workers that can take the job the one wins that would have its prompt computed first:

    seconds = what waits and runs there already + the fastest way to the prompt's KV (`kv_plans.py`)

so a prefix hit draws a job to its worker until that worker's queue takes longer than fetching, or computing, the prefix
elsewhere. The form is that of Dynamo's KV router (overlap against load); the units are ours. Equal times go to the
worker with fewer sequences, then by a hash of request and worker, which spreads ties evenly and needs no state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Literal, Protocol

from services.scheduler.index import Match
from services.scheduler.kv_plans import Candidate, Credits, Held, JobShape, KvPlan, MatchView, plans, takes

Policy = Literal["kv_aware", "least_loaded", "round_robin"]
"""`kv_aware` is described above. `least_loaded` knows no KV, `round_robin` nothing at all: both are for comparison."""
LARGE_FLEET = 32
"""Workers up to which each is weighed for each job."""
DRAWN_WORKERS = 8

_NOT_DETERMINISTIC = "No connected worker of the model is deterministic: one is if it was started with --deterministic."
_WRONG_KIND = "No other connected worker computes exactly as the one that began this deterministic request."
_NOTHING_HELD = Held(Match([], {}, {}))

Reason = Literal["prefix_hit", "fetch", "prefill", "least_loaded"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The worker that was chosen, how it is to come by the prompt's KV, and what the placement costs it."""

    worker: Candidate
    plan: KvPlan
    cost: Credits

    def costs(self) -> dict[str, Credits]:
        """What it takes of which worker."""
        prefill = self.plan.prefill
        return {self.worker.id: self.cost} | ({prefill.worker.id: prefill.cost} if prefill is not None else {})

    @property
    def reason(self) -> Reason:
        if self.plan.prefill is not None:
            return "prefill"
        if self.plan.holders:
            return "fetch"
        return "prefix_hit" if self.plan.hit_tokens else "least_loaded"


class IndexView(Protocol):
    """What placement asks of the block index."""

    def match(self, kv_format: str, hashes: Sequence[bytes]) -> MatchView: ...


def place(
    job: JobShape,
    candidates: Sequence[Candidate],
    index: IndexView,
    *,
    avoid: str = "",
    beyond_share: bool = False,
    policy: Policy = "kv_aware",
    turn: int = 0,
) -> Choice | None:
    """The best worker for the job, or None while no worker can take it. `avoid` is taken only if no other can.

    `beyond_share`: what is free on a worker counts even where it is granted to another scheduler. `turn` counts the
    placements, for `round_robin`.
    """
    candidates = [worker for worker in candidates if job.accepts(worker)]
    roomy = [worker for worker in candidates if worker.healthy and (beyond_share or worker.credits.sequences > 0)]
    if job.alone:
        roomy = _leaving_room(job, roomy, candidates)
    held: dict[str, Held] = {}
    prefillers: Sequence[Candidate] = ()
    if policy == "kv_aware":
        formats = {worker.kv_format for worker in roomy}
        held = {kv_format: Held(index.match(kv_format, job.block_hashes)) for kv_format in formats}
        prefillers = [worker for worker in candidates if worker.role == "prefill" and not job.alone]
        prefillers = _shortlist(job, prefillers, held)
    takers: list[Choice] = []
    if policy != "round_robin":
        takers = _takers(job, _shortlist(job, roomy, held), held, prefillers, beyond_share)
    if not takers:  # none of a large fleet's shortlist
        takers = _takers(job, roomy, held, prefillers, beyond_share)
    if policy == "round_robin":
        order = {worker.id: (position - turn) % len(candidates) for position, worker in enumerate(candidates)}
        return min(takers, key=lambda choice: (*_reluctance(job, choice, avoid), order[choice.worker.id]), default=None)
    return min(takers, key=lambda choice: _preference(job, choice, avoid), default=None)


def _takers(
    job: JobShape,
    workers: Sequence[Candidate],
    held: Mapping[str, Held],
    prefillers: Sequence[Candidate],
    beyond_share: bool,
) -> list[Choice]:
    """Every way in which one of these workers can take the job now."""
    choices = (
        Choice(
            worker,
            plan,
            Credits(
                worker.max_sequences if job.alone else job.choices,
                worker.blocks_for(job) + job.choices,
                plan.compute_tokens,
            ),
        )
        for worker in workers
        for plan in plans(job, worker, held.get(worker.kv_format, _NOTHING_HELD), prefillers)
    )
    return [choice for choice in choices if _can_take(choice.worker, job, choice.cost, beyond_share)]


def _shortlist(job: JobShape, workers: Sequence[Candidate], held: Mapping[str, Held]) -> Sequence[Candidate]:
    """All of a small fleet. Of a large one those that hold most of the prompt, and a few drawn by the request's id.

    Looking at a few at random balances load nearly as well as looking at all (Mitzenmacher, "The Power of Two Choices
    in Randomized Load Balancing", 2001), at a cost that does not grow with the fleet.
    """
    if len(workers) <= LARGE_FLEET:
        return workers
    best = {key[0] for each in held.values() for key, _ in each.best}
    draw = Random(job.request_id)
    drawn = {draw.randrange(len(workers)) for _ in range(DRAWN_WORKERS)}
    return [worker for position, worker in enumerate(workers) if position in drawn or worker.id in best]


def kept(job: JobShape, candidates: Sequence[Candidate]) -> str:
    """Which worker takes nothing else while the job, which has to be alone, waits for an idle one; "" if none does.

    Where such a job runs already, nothing more need be drained. Of busy workers not the one with the least to do but
    always the same, also for other such jobs and other schedulers: two that drained one each would fill what the other
    drains.
    """
    able = [worker for worker in candidates if worker.healthy and job.accepts(worker) and _fits_idle(worker, job)]
    order = {
        (not worker.lone, not worker.idle, worker.probe, worker.role == "prefill", worker.id): worker.id
        for worker in able
    }
    return order[min(order)] if order else ""


def _leaving_room(job: JobShape, workers: Sequence[Candidate], fleet: Sequence[Candidate]) -> list[Candidate]:
    """The workers that a job may have for itself: the one kept for it, and those beside which others find room."""
    own, with_room = kept(job, fleet), {worker.id for worker in fleet if worker.room}
    return [worker for worker in workers if worker.id == own or with_room - {worker.id}]


def impossible(job: JobShape, candidates: Sequence[Candidate]) -> str | None:
    """Why none of these workers could run the job even when idle, in one sentence; None if one could."""
    accepted = [worker for worker in candidates if job.accepts(worker)]
    if not candidates or any(_fits_idle(worker, job) for worker in accepted):
        return None
    if not accepted:
        return _WRONG_KIND if job.kv_format else _NOT_DETERMINISTIC
    largest = max(accepted, key=lambda worker: (worker.max_sequences, worker.total_blocks))
    return (
        f"{job.choices} choices of a prompt of {job.prompt_tokens} tokens fit no connected worker: "
        f"the largest runs {largest.max_sequences} sequences in {largest.total_blocks * largest.block_size} tokens."
    )


def _can_take(worker: Candidate, job: JobShape, cost: Credits, beyond_share: bool) -> bool:
    if worker.idle and _fits_idle(worker, job):
        return True
    if job.alone:
        return False
    return (beyond_share and _fits_free(worker, cost)) or takes(worker, cost)


def _fits_idle(worker: Candidate, job: JobShape) -> bool:
    """Whether it could run alone. Its prompt alone must fit: choices for which no block is left take turns."""
    return job.choices <= worker.max_sequences and worker.blocks_for(job) <= worker.total_blocks


def _fits_free(worker: Candidate, cost: Credits) -> bool:
    """Whether it fits what is free of the whole worker. One that takes on prompt tokens at all takes any number."""
    takes_prefill = worker.credits.prefill_tokens > 0 or not worker.pending_prefill_tokens
    free_sequences = worker.max_sequences - worker.sequences
    return cost.sequences <= free_sequences and cost.blocks <= worker.free_blocks and takes_prefill


def _reluctance(job: JobShape, choice: Choice, avoid: str) -> tuple[bool, bool, bool]:
    """A prefill worker decodes, and a job that has failed is a probe, only when no other worker can take it."""
    worker = choice.worker
    return worker.id == avoid, worker.probe and job.failed, worker.role == "prefill"


def _preference(job: JobShape, choice: Choice, avoid: str) -> tuple[bool, bool, bool, float, int, bytes]:
    """Sorts the ways in which the job can be taken, the best first."""
    worker = choice.worker
    tie = blake2b(f"{job.request_id}\0{worker.id}".encode(), digest_size=8).digest()
    return *_reluctance(job, choice, avoid), worker.busy_s() + choice.plan.seconds, worker.sequences, tie
