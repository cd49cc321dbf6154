"""A closed loop of streamed completions against any OpenAI-compatible server, and what its clients saw.

Every request is greedy, ignores end-of-sequence tokens and asks for a fixed number of tokens, so that every server does
the same work. Prompts are token ids from a seeded generator: no server gains from another's run, and prefix caches help
only where a row shares a prefix on purpose. Give each run on a server a new seed.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp

# Ordinary words of every tokenizer in use lie here: above the special and single-byte tokens, and within the smallest
# vocabularies (32,000).
_TOKEN_RANGE = (300, 30_000)
_WARMING_TOKENS = 4


class LoadFailed(Exception):
    """The server answered an error, or cut a stream short; the message says which."""


@dataclass(frozen=True, slots=True)
class Row:
    """A piece of work: `requests` in all, `concurrency` at a time; lengths in tokens."""

    name: str
    requests: int
    concurrency: int
    shared_prefix: int
    unique_prompt: int
    output: int


ROWS = (
    Row("single", requests=4, concurrency=1, shared_prefix=0, unique_prompt=32, output=128),
    Row("batch8", requests=16, concurrency=8, shared_prefix=0, unique_prompt=128, output=128),
    Row("batch32", requests=64, concurrency=32, shared_prefix=0, unique_prompt=128, output=64),
    Row("prefill", requests=6, concurrency=1, shared_prefix=0, unique_prompt=1536, output=4),
    Row("prefix", requests=24, concurrency=8, shared_prefix=1024, unique_prompt=32, output=32),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer as its client saw it; seconds from sending the request."""

    ttft_s: float
    total_s: float
    tokens: int

    @property
    def inter_token_s(self) -> float:
        return (self.total_s - self.ttft_s) / max(self.tokens - 1, 1)


@dataclass(frozen=True, slots=True)
class RowResult:
    """What a row's clients saw. Rates count what was asked for and delivered within `wall_s`."""

    row: str
    seed: int
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    inter_token_p50_ms: float
    wall_s: float
    short_answers: int


async def run_row(url: str, model: str, row: Row, seed: int, on_answer: Callable[[], None] = lambda: None) -> RowResult:
    """Does a row's work once, after one warming request. Raises LoadFailed."""
    draw = random.Random(f"{row.name} {seed}")
    prefix = _token_ids(draw, row.shared_prefix)
    prompts = [prefix + _token_ids(draw, row.unique_prompt) for _ in range(row.requests)]
    slots = asyncio.Semaphore(row.concurrency)
    async with aiohttp.ClientSession(
        base_url=url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=900)
    ) as session:
        await _complete(session, model, prefix + _token_ids(draw, row.unique_prompt), _WARMING_TOKENS)

        async def answer(prompt: list[int]) -> Answer:
            async with slots:
                result = await _complete(session, model, prompt, row.output)
            on_answer()
            return result

        started = time.perf_counter()
        answers = await asyncio.gather(*(answer(prompt) for prompt in prompts))
        return _summarize(row, seed, answers, time.perf_counter() - started)


async def first_model(url: str) -> str:
    """The first model that the server lists."""
    async with aiohttp.ClientSession(base_url=url) as session, session.get("/v1/models") as reply:
        return str((await reply.json())["data"][0]["id"])


def _token_ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(*_TOKEN_RANGE) for _ in range(count)]


async def _complete(session: aiohttp.ClientSession, model: str, prompt: list[int], output: int) -> Answer:
    body = {"model": model, "prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    sent = time.perf_counter()
    first = last = 0.0
    tokens = 0
    async with session.post("/v1/completions", json=body) as reply:
        if reply.status != 200:
            raise LoadFailed(f"HTTP {reply.status}: {(await reply.text())[:300]}")
        async for line in reply.content:
            if not line.startswith(b"data:") or line.rstrip().endswith(b"[DONE]"):
                continue
            event = json.loads(line[len(b"data:") :])
            if "error" in event:
                raise LoadFailed(f"error event: {event['error']}")
            if any(choice.get("text") for choice in event["choices"]):
                last = time.perf_counter()
                first = first or last
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    if not first:
        raise LoadFailed("the stream ended without a token")
    return Answer(ttft_s=first - sent, total_s=last - sent, tokens=tokens)


def _summarize(row: Row, seed: int, answers: Sequence[Answer], wall_s: float) -> RowResult:
    ttft = [answer.ttft_s for answer in answers]
    return RowResult(
        row=row.name,
        seed=seed,
        output_tokens_per_s=sum(answer.tokens for answer in answers) / wall_s,
        prompt_tokens_per_s=row.requests * (row.shared_prefix + row.unique_prompt) / wall_s,
        ttft_p50_ms=_quantile(ttft, 0.5) * 1e3,
        ttft_p99_ms=_quantile(ttft, 0.99) * 1e3,
        inter_token_p50_ms=_quantile([answer.inter_token_s for answer in answers], 0.5) * 1e3,
        wall_s=wall_s,
        short_answers=sum(answer.tokens != row.output for answer in answers),
    )


def _quantile(values: Sequence[float], fraction: float) -> float:
    """Nearest-rank quantile."""
    return sorted(values)[min(len(values) - 1, int(fraction * len(values)))]
