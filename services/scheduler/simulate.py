"""Chats over a simulated fleet, placed by the real index and the real placement: what each policy computes and hits.

    python -m services.scheduler.simulate [--workers 64] [--requests 100000]

Conversations begin at random, share system prompts, and go on for some turns, each after its answer. A simulated worker
computes prompts one after the other at a fixed rate, decodes everything at once, and keeps the least recently used
blocks no longer than its pool has room. Its events reach the index in the protocol's messages. Printed for each policy:
prompt tokens computed, hits as a share of what one infinite cache would hit, waits, and the time a placement takes.
Before that, what an index of a million blocks takes, and a placement among a thousand workers.
"""

import argparse
import heapq
import itertools
import random
import resource
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headrace.v1.cache_pb2 import Holder, HolderBlocks, IndexUpdate
from headrace.v1.scheduler_pb2 import Credits as CreditsProto
from headrace.v1.scheduler_pb2 import ModelInfo, Registration, WorkerState
from services.common.block_hash import block_hash
from services.scheduler.fleet import Fleet
from services.scheduler.index import BlockIndex
from services.scheduler.kv_plans import SEQUENCE_TOKENS, Candidate, Credits, JobShape
from services.scheduler.placement import Policy, place

BLOCK_SIZE = 16
BLOCK_BYTES = 368_640  # of SmolLM2-135M in bfloat16
TOKENS_PER_S = 2_000.0  # that a worker computes of prompts
TOKEN_S = 0.02  # that a worker takes for a token of output
POOL_BLOCKS = 4_096
MAX_SEQUENCES = 32
SYSTEM_PROMPTS, SYSTEM_BLOCKS = 32, 32
TURNS = 6
QUESTION_BLOCKS, ANSWER_BLOCKS = (2, 12), (4, 16)
_PATIENCE_S = 1.0  # until a question that found no room is asked again
LOAD = 0.3  # of what the fleet could compute if nothing were cached twice


@dataclass(slots=True)
class Conversation:
    """A chat so far: the chain hashes of all its blocks."""

    number: int
    chain: list[bytes]
    turn: int = 0
    asked: bool = False  # its question is part of the chain and waits for a worker
    draws: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draws = random.Random(self.number)  # its own, so that every policy gets the same chats

    def grow(self, blocks: int) -> None:
        for _ in range(blocks):
            self.chain.append(block_hash(self.chain[-1], (self.number, len(self.chain))))


@dataclass(slots=True)
class Worker:
    """One simulated worker."""

    id: str
    pool: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # least recently used first
    free_at: float = 0.0  # when its last prompt is computed
    ends: list[float] = field(default_factory=list)  # a heap: when its sequences end

    def candidate(self, now: float) -> Candidate:
        while self.ends and self.ends[0] <= now:
            heapq.heappop(self.ends)
        pending = int(max(0.0, self.free_at - now) * TOKENS_PER_S)
        return Candidate(
            id=self.id,
            incarnation="1",
            kv_format="f",
            block_size=BLOCK_SIZE,
            block_bytes=BLOCK_BYTES,
            max_sequences=MAX_SEQUENCES,
            total_blocks=POOL_BLOCKS,
            healthy=True,
            role="both",
            credits=Credits(MAX_SEQUENCES - len(self.ends), POOL_BLOCKS, 8192 - pending),
            free_blocks=POOL_BLOCKS,
            sequences=len(self.ends),
            pending_prefill_tokens=pending,
            prefill_tokens_per_s=TOKENS_PER_S,
        )

    def keep(self, chain: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Uses and adds blocks; returns what was added and what had to go."""
        added = [name for name in chain if name not in self.pool]
        for name in reversed(chain):  # heads are newer than tails
            self.pool[name] = None
            self.pool.move_to_end(name)
        removed = [self.pool.popitem(last=False)[0] for _ in range(len(self.pool) - POOL_BLOCKS)]
        return added, removed

    def has(self, chain: Sequence[bytes]) -> int:
        """Leading blocks of a chain that it holds."""
        return next((count for count, name in enumerate(chain) if name not in self.pool), len(chain))


@dataclass(slots=True)
class Outcome:
    """What one policy made of the chats."""

    policy: Policy
    prompt_tokens: int = 0
    computed_tokens: int = 0
    best_hit_tokens: int = 0  # of one infinite cache
    moved_blocks: int = 0
    waits_s: list[float] = field(default_factory=list)
    placements_s: list[float] = field(default_factory=list)

    @property
    def hit_share(self) -> float:
        return (self.prompt_tokens - self.computed_tokens) / max(1, self.best_hit_tokens)


class Simulation:
    """One run of all chats under one policy."""

    def __init__(self, policy: Policy, workers: int, requests: int, seed: int = 0) -> None:
        self.outcome = Outcome(policy)
        self._policy = policy
        self._requests = requests
        self._random = random.Random(seed)
        self._workers = {f"w{number}": Worker(f"w{number}") for number in range(workers)}
        self._index = BlockIndex()
        self._updates = itertools.count(1)
        self._seen: set[bytes] = set()
        systems = [Conversation(2**31 + number, [bytes([number]) * 16]) for number in range(SYSTEM_PROMPTS)]
        for system in systems:
            system.grow(SYSTEM_BLOCKS - 1)
        self._systems = [system.chain for system in systems]
        for id in self._workers:
            self._tell(IndexUpdate(holder_joined=Holder(id=id, incarnation="1", kv_format="f", address=id)))

    def run(self) -> Outcome:
        mean_blocks = SYSTEM_BLOCKS + TURNS / 2 * (sum(QUESTION_BLOCKS) + sum(ANSWER_BLOCKS)) / 2
        rate = LOAD * len(self._workers) * TOKENS_PER_S / (mean_blocks * BLOCK_SIZE) / TURNS * 2
        arrivals: list[tuple[float, int, Conversation]] = []
        now, numbers = 0.0, itertools.count()
        for _ in range(self._requests // TURNS):
            now += self._random.expovariate(rate)
            chat = Conversation(next(numbers), list(self._random.choice(self._systems)))
            arrivals.append((now, chat.number, chat))
        heapq.heapify(arrivals)
        while arrivals:
            now, number, chat = heapq.heappop(arrivals)
            done = self._ask(now, chat)
            if done is None:  # everything is full
                heapq.heappush(arrivals, (now + _PATIENCE_S, number, chat))
                continue
            chat.turn, chat.asked = chat.turn + 1, False
            if chat.turn < TURNS:
                heapq.heappush(arrivals, (done + chat.draws.expovariate(0.2), number, chat))
        return self.outcome

    def _ask(self, now: float, chat: Conversation) -> float | None:
        """One turn of a chat; returns when its answer is complete, or None if no worker can take it now."""
        outcome = self.outcome
        if not chat.asked:
            chat.grow(chat.draws.randint(*QUESTION_BLOCKS))
            chat.asked = True
        prompt = list(chat.chain)
        job = JobShape(f"r{chat.number}-{chat.turn}", len(prompt) * BLOCK_SIZE + 1, 1, prompt)
        candidates = [worker.candidate(now) for worker in self._workers.values()]
        began = time.perf_counter()
        choice = place(job, candidates, self._index, policy=self._policy, turn=len(outcome.placements_s))
        outcome.placements_s.append(time.perf_counter() - began)
        if choice is None:
            return None
        worker = self._workers[choice.worker.id]
        have = worker.has(prompt)
        for (holder, _), blocks in choice.plan.holders[:1]:
            moved = min(blocks, self._workers[holder].has(prompt))
            outcome.moved_blocks += max(0, moved - have)
            have = max(have, moved)
        compute = job.prompt_tokens - have * BLOCK_SIZE
        slowed = 1 + SEQUENCE_TOKENS * len(worker.ends) / 512
        worker.free_at = max(now, worker.free_at) + compute * slowed / TOKENS_PER_S
        known = next((count for count, name in enumerate(prompt) if name not in self._seen), len(prompt))
        outcome.prompt_tokens += job.prompt_tokens
        outcome.computed_tokens += compute
        outcome.best_hit_tokens += known * BLOCK_SIZE
        outcome.waits_s.append(worker.free_at - now)
        return self._answer(worker, chat)

    def _answer(self, worker: Worker, chat: Conversation) -> float:
        blocks = chat.draws.randint(*ANSWER_BLOCKS)
        chat.grow(blocks)
        done = worker.free_at + blocks * BLOCK_SIZE * TOKEN_S
        heapq.heappush(worker.ends, done)
        self._seen.update(chat.chain)
        added, removed = worker.keep(chat.chain)
        change = HolderBlocks(holder_id=worker.id, stored=b"".join(added), removed=b"".join(removed))
        self._tell(IndexUpdate(blocks=change))
        return done

    def _tell(self, update: IndexUpdate) -> None:
        update.epoch, update.sequence = "e", next(self._updates)
        self._index.apply(update)


def _time_index(blocks: int = 1_000_000, length: int = 100) -> None:
    """The index with a million blocks: what it takes of memory, and how fast it matches chains."""
    index, number = BlockIndex(), itertools.count(1)
    before = _rss_mib()
    index.apply(IndexUpdate(epoch="e", sequence=next(number), holder_joined=Holder(id="w", kv_format="f")))
    source = random.Random(0)
    chains: list[list[bytes]] = []
    for first in range(0, blocks, length):
        chain = [source.randbytes(16) for _ in range(length)]
        stored = b"".join(chain)
        change = HolderBlocks(holder_id="w", stored=stored, stored_digests=stored[::-1])
        index.apply(IndexUpdate(epoch="e", sequence=next(number), blocks=change))
        if first % (10 * length) == 0:
            chains.append([bytes(bytearray(name)) for name in chain])  # as a job brings them: objects of their own
    used = _rss_mib() - before - sum(map(len, chains)) * 57 / 2**20
    bare = {source.randbytes(16): 1 for _ in range(blocks - len(chains) * length)}
    bare |= {bytes(bytearray(name)): 1 for chain in chains for name in chain}
    # In turns, since the machine changes from one tenth of a second to the next.
    turns = [chains[first : first + 50] for first in range(0, len(chains), 50)]
    rates = [
        (
            _rate(turn, lambda chain: index.match("f", chain).best(1)),
            _rate(turn, lambda chain: list(map(bare.get, chain))),
        )
        for turn in turns
    ]
    rate, bare_rate = map(statistics.median, zip(*rates, strict=True))
    print(
        f"index: {blocks:,} blocks in {used:.0f} MiB, {rate:,.0f} look-ups a second of chains of {length} blocks"
        f" ({bare_rate:,.0f} in a bare dict of as many names)"
    )


def _rate(chains: Sequence[list[bytes]], look_up: Callable[[list[bytes]], object]) -> float:
    """Chains a second."""
    began = time.perf_counter()
    for chain in chains:
        assert look_up(chain)
    return len(chains) / (time.perf_counter() - began)


def _time_placement(workers: int = 1_000, jobs: int = 300) -> None:
    """Placement in a large fleet, with all that a job's turn takes: the fleet's state, the index, the choice."""
    fleet = Fleet(silence_s=1e9, placement_timeout_s=1e9)
    index, number = BlockIndex(), itertools.count(1)
    model = ModelInfo(name="m", max_context_tokens=8192, vocabulary_size=50_000, block_size=16, tokenizer_hash="t")
    source = random.Random(0)
    shared = [source.randbytes(16) for _ in range(100)]
    for position in range(workers):
        id = f"w{position}"
        registration = Registration(worker_id=id, incarnation="1", address=id, model=model, kv_format="f")
        registration.max_sequences, registration.total_blocks, registration.block_bytes = 32, 4096, BLOCK_BYTES
        credits = CreditsProto(sequences=32, blocks=4096, prefill_tokens=8192)
        fleet.report(fleet.register(registration), WorkerState(credits=credits, free_blocks=4096))
        holder = Holder(id=id, incarnation="1", kv_format="f")
        index.apply(IndexUpdate(epoch="e", sequence=next(number), holder_joined=holder))
        stored = b"".join(shared[: source.randrange(101)])
        change = HolderBlocks(holder_id=id, stored=stored)
        index.apply(IndexUpdate(epoch="e", sequence=next(number), blocks=change))
    times = []
    for job in range(jobs):
        shape = JobShape(f"r{job}", 1601, 1, [bytes(bytearray(name)) for name in shared])
        began = time.perf_counter()
        choice = place(shape, fleet.candidates("m"), index)
        assert choice is not None
        fleet.reserve(choice.worker.id, (shape.request_id, 1), choice.cost)
        times.append(time.perf_counter() - began)
    print(f"placement among {workers:,} workers: {statistics.median(times) * 1e3:.2f} ms p50")


def _rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="Chats over a simulated fleet, by each placement policy.")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--requests", type=int, default=100_000)
    options = parser.parse_args()
    _time_index()
    _time_placement()
    print(f"{options.requests} requests over {options.workers} workers")
    print("policy         computed tokens   hits of best   blocks moved   wait p50   wait p99   placement p50")
    policies: tuple[Policy, ...] = ("kv_aware", "least_loaded", "round_robin")
    for policy in policies:
        outcome = Simulation(policy, options.workers, options.requests).run()
        waits = sorted(outcome.waits_s)
        print(
            f"{policy:<14} {outcome.computed_tokens:>15,} {outcome.hit_share:>13.1%} {outcome.moved_blocks:>14,}"
            f" {statistics.median(waits):>8.2f} s {waits[len(waits) * 99 // 100]:>8.2f} s"
            f" {statistics.median(outcome.placements_s) * 1e3:>12.2f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
