"""Chats over several workers of a real stack, placed by each policy: what is computed, and what is found in KV caches.

Conversations share system prompts and take turns at random lengths; each turn's prompt is all that was said before, the
model's own tokens included. What one cache that never forgets would find of every prompt is worked out on the way.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.v1.inference_pb2 import GenerateRequest, ListModelsRequest, TokenIds
from headrace.v1.inference_pb2_grpc import InferenceStub
from headrace.v1.sampling_pb2 import Sampling, Stopping
from services.common.block_hash import chain_hashes, chain_root
from services.common.channel import dial_front
from services.common.mutual_tls import showing
from toolkit.bench_stack import all_workers, stack_of_our_own
from toolkit.loadtest import quantile
from toolkit.run_directory import RunningStack, running_stacks

if TYPE_CHECKING:
    from headrace.v1.inference_pb2_grpc import InferenceAsyncStub

POLICIES = ("kv_aware", "round_robin")
WORKERS = 4
CONVERSATIONS, TURNS = 40, 6
SYSTEM_PROMPTS, SYSTEM_TOKENS = 4, 256
QUESTION_TOKENS = range(24, 97)
ANSWER_TOKENS = 32
_AT_ONCE = 8
_TOKENS = (300, 30_000)  # ids that every vocabulary of interest has
_TIMEOUT_S = 600.0


@dataclass(slots=True)
class ChatsRow:
    """What one policy made of the chats."""

    policy: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    # Of one cache that never forgets.
    best_cached_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    @property
    def hit_share(self) -> float:
        """Of what the best cache would hit."""
        return self.cached_tokens / self.best_cached_tokens

    @property
    def first_token_p50_ms(self) -> float:
        return quantile(self.first_token_s, 0.5) * 1e3


async def run_chats_bench(up_arguments: Sequence[str], folder: Path, runs: Path) -> list[ChatsRow]:
    """One stack after the other. Raises StackEnded."""
    rows = []
    for policy in POLICIES:
        arguments = ("--workers", str(WORKERS), "--placement", policy, *up_arguments)
        async with stack_of_our_own(policy, arguments, folder / "chats.log") as server:
            stack = next(stack for stack in running_stacks(runs) if stack.http_url == server.url)
            with showing(stack.tls):
                rows.append(await _measure(policy, stack))
    return rows


async def _measure(policy: str, stack: RunningStack) -> ChatsRow:
    block_size = (await all_workers(stack, WORKERS))[0].model.block_size
    async with dial_front(stack.grpc_address, stack.front_cert) as channel:
        chats = Chats(InferenceStub(channel), block_size, ChatsRow(policy))
        started = time.perf_counter()
        await chats.run()
        chats.row.wall_s = time.perf_counter() - started
    return chats.row


class Chats:
    """All conversations on one stack."""

    def __init__(self, stub: "InferenceAsyncStub", block_size: int, row: ChatsRow) -> None:
        self.row = row
        self._stub = stub
        self._block_size = block_size
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._seen: set[bytes] = set()
        self._model = ""

    async def run(self) -> None:
        """Every conversation asks again when its last answer is complete and its turn has come."""
        self._model = (await self._stub.ListModels(ListModelsRequest(), wait_for_ready=True)).models[0].name
        draws = random.Random(0)
        systems = [_words(draws, SYSTEM_TOKENS) for _ in range(SYSTEM_PROMPTS)]
        talks = [self._talk(random.Random(number), draws.choice(systems)) for number in range(CONVERSATIONS)]
        await asyncio.gather(*talks)

    async def _talk(self, draws: random.Random, system: list[int]) -> None:
        said = list(system)
        for _ in range(TURNS):
            said += _words(draws, draws.choice(QUESTION_TOKENS))
            async with self._turns:
                said += await self._ask(said)

    async def _ask(self, prompt: list[int]) -> list[int]:
        """The answer's tokens."""
        self._count_best(prompt)
        request = GenerateRequest(
            model=self._model,
            token_ids=TokenIds(ids=prompt),
            sampling=Sampling(temperature=0.0),
            stopping=Stopping(max_tokens=ANSWER_TOKENS, ignore_eos=True),
        )
        answer: list[int] = []
        started = time.perf_counter()
        async for delta in self._stub.Generate(request, timeout=_TIMEOUT_S):
            if not answer and delta.token_ids:
                self.row.first_token_s.append(time.perf_counter() - started)
            answer += delta.token_ids
            if delta.HasField("usage"):
                self.row.prompt_tokens += delta.usage.prompt_tokens
                self.row.cached_tokens += delta.usage.cached_prompt_tokens
        self._seen.update(self._names(prompt + answer))
        return answer

    def _count_best(self, prompt: list[int]) -> None:
        names = self._names(prompt)
        known = next((count for count, name in enumerate(names) if name not in self._seen), len(names))
        self.row.best_cached_tokens += known * self._block_size
        self._seen.update(names)

    def _names(self, tokens: list[int]) -> list[bytes]:
        """Chain hashes of the full blocks before the last token, whose KV nobody has."""
        return chain_hashes(chain_root(self._model, self._block_size, ""), tokens[:-1], self._block_size)


def _words(draws: random.Random, count: int) -> list[int]:
    return [draws.randrange(*_TOKENS) for _ in range(count)]
