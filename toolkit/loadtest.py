"""A closed loop of streamed completions against any OpenAI-compatible server, and what its clients saw.

Every request is greedy, ignores end-of-sequence tokens and asks for a fixed number of tokens, so that every server does
the same work. Prompts are token ids from a seeded generator: no server gains from another's run, and prefix caches help
only where a row shares a prefix on purpose. Give each run on a server a new seed. What a small model writes after such
prompts repeats itself, which speculative decoding gains from: the row "text" asks in ordinary English instead.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import aiohttp

# Ordinary words of every tokenizer in use lie here: above the special and single-byte tokens, and within the smallest
# vocabularies (32,000).
_TOKEN_RANGE = (300, 30_000)
_WARMING_TOKENS = 4
_WARMING_PROMPT = 4
# The longest that a row's slowest request may take.
_REQUEST_TIMEOUT_S = 900.0
# For a list of models, which may have to wait for cores that others keep busy.
_FIRST_ANSWER_S = 30.0
# Has Headrace say where a request's time went; others do not know it.
_WITH_TIMINGS = {"x-headrace-timings": "1"}


Rate = Literal["output", "prompt"]
"""Which tokens are counted: those that were written, or those that were read."""


class LoadFailed(Exception):
    """The server answered an error, cut a stream short, or did not answer; the message says which."""


@dataclass(frozen=True, slots=True)
class Row:
    """A piece of work: `requests` in all, `concurrency` at a time.

    Lengths are in tokens; a range is what each request's own length is drawn from.
    """

    name: str
    requests: int
    concurrency: int
    shared_prefix: int
    unique_prompt: int | range
    output: int | range
    # Which one tells how fast the work was done.
    rate: Rate = "output"
    # What to ask, each at most once; then there are no token ids, and prompt tokens are not counted.
    texts: tuple[str, ...] = ()


ROWS = (
    Row("single", requests=4, concurrency=1, shared_prefix=0, unique_prompt=32, output=128),
    Row("batch8", requests=16, concurrency=8, shared_prefix=0, unique_prompt=128, output=128),
    Row("batch32", requests=64, concurrency=32, shared_prefix=0, unique_prompt=128, output=64),
    Row("prefill", requests=6, concurrency=1, shared_prefix=0, unique_prompt=1536, output=4, rate="prompt"),
    Row("prefix", requests=24, concurrency=8, shared_prefix=1024, unique_prompt=32, output=32),
)

_SUBJECTS = (
    "rivers", "glass", "bread", "the moon", "bridges", "bees", "paper", "clocks", "volcanoes", "trains", "salt",
    "forests", "sailing ships", "libraries", "honey", "winter", "the human heart", "electric motors", "maps", "rice",
)  # fmt: skip
TEXT = Row(
    "text",
    requests=6,
    concurrency=1,
    shared_prefix=0,
    unique_prompt=0,
    output=128,
    texts=tuple(f"A short introduction to {subject}, for curious readers of all ages.\n\n" for subject in _SUBJECTS),
)

# For one batching policy against another: sequences that end at different times.
MIXED = Row("mixed", requests=32, concurrency=8, shared_prefix=0, unique_prompt=range(16, 257), output=range(8, 193))


@dataclass(frozen=True, slots=True)
class Request:
    """What one request asks for: a prompt, of token ids or as text, and how many tokens to write."""

    prompt: tuple[int, ...] | str
    output: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer as its client saw it; seconds from sending the request."""

    ttft_s: float
    total_s: float
    tokens: int
    gaps_s: tuple[float, ...] = ()
    """Times between events with text, in order."""
    server_ms: Mapping[str, float] = field(default_factory=dict)
    """Where the time went by the server's own account, if it gives one."""

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
    # The medians of what the server itself told of each request's time, by its own names.
    server_ms: Mapping[str, float] = field(default_factory=dict)

    def rate(self, kind: Rate) -> float:
        """Tokens per second."""
        return {"output": self.output_tokens_per_s, "prompt": self.prompt_tokens_per_s}[kind]


async def run_row(
    url: str,
    model: str,
    row: Row,
    seed: int,
    on_answer: Callable[[], None] = lambda: None,
    measured: AbstractContextManager[object] | None = None,
) -> RowResult:
    """Does a row's work once, after one warming request; `measured` is entered for the work alone.

    Raises LoadFailed.
    """
    warming, *requests = draw_requests(row, seed)
    slots = asyncio.Semaphore(row.concurrency)
    async with open_session(url, _REQUEST_TIMEOUT_S) as session:
        await complete(session, model, Request(warming.prompt, _WARMING_TOKENS))

        async def answer(request: Request) -> Answer:
            async with slots:
                result = await complete(session, model, request)
            on_answer()
            return result

        with measured or nullcontext():
            started = time.perf_counter()
            answers = await asyncio.gather(*(answer(request) for request in requests))
            wall_s = time.perf_counter() - started
    return _summarize(row, seed, requests, answers, wall_s)


def draw_requests(row: Row, seed: int) -> list[Request]:
    """One request to warm up with, then the row's own ones: the same ones for the same seed."""
    draw = random.Random(f"{row.name} {seed}")
    if row.texts:
        return [Request(text, _length(draw, row.output)) for text in draw.sample(row.texts, 1 + row.requests)]
    prefix = _token_ids(draw, row.shared_prefix)
    return [
        Request(prefix + _token_ids(draw, _length(draw, row.unique_prompt)), _length(draw, row.output))
        for _ in range(1 + row.requests)
    ]


async def first_model(url: str) -> str:
    """The first model that the server lists. Raises LoadFailed if what it answers is no list of models."""
    async with open_session(url, _FIRST_ANSWER_S) as session, session.get("/v1/models") as reply:
        try:
            return str((await reply.json(content_type=None))["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise LoadFailed(f"GET {url}/v1/models answers HTTP {reply.status} without a list of models") from error


async def lists_models(url: str) -> bool:
    """True if the server answers GET /v1/models with a list of models."""
    try:
        return bool(await first_model(url))
    except (aiohttp.ClientError, TimeoutError, LoadFailed):
        return False


async def completes(url: str, timeout_s: float) -> bool:
    """True if the server's first model answers a completion of a few tokens in time."""
    request = draw_requests(Row("ready", 0, 1, 0, _WARMING_PROMPT, _WARMING_TOKENS), seed=0)[0]
    try:
        model = await first_model(url)
        async with open_session(url, timeout_s) as session:
            await complete(session, model, request)
    except (aiohttp.ClientError, TimeoutError, LoadFailed):
        return False
    return True


def open_session(url: str, timeout_s: float) -> aiohttp.ClientSession:
    """Connections to one server, a new one for each request."""
    return aiohttp.ClientSession(
        base_url=url,
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
    )


def _length(draw: random.Random, length: int | range) -> int:
    return length if isinstance(length, int) else draw.choice(length)


def _token_ids(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(*_TOKEN_RANGE) for _ in range(count))


async def complete(session: aiohttp.ClientSession, model: str, request: Request) -> Answer:
    """One streamed completion. Raises LoadFailed."""
    try:
        return await _stream(session, model, request)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise LoadFailed(f"no answer to POST /v1/completions: {type(error).__name__} {error}".rstrip()) from error


async def _stream(session: aiohttp.ClientSession, model: str, request: Request) -> Answer:
    body: dict[str, object] = {"model": model, "prompt": request.prompt, "max_tokens": request.output}
    body |= {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    sent = time.perf_counter()
    first = last = 0.0
    gaps: list[float] = []
    tokens = 0
    server_ms: dict[str, float] = {}
    async with session.post("/v1/completions", json=body, headers=_WITH_TIMINGS) as reply:
        if reply.status != 200:
            raise LoadFailed(f"HTTP {reply.status}: {(await reply.text())[:300]}")
        async for line in reply.content:
            if not line.startswith(b"data:") or line.rstrip().endswith(b"[DONE]"):
                continue
            event = json.loads(line[len(b"data:") :])
            if "error" in event:
                raise LoadFailed(f"error event: {event['error']}")
            if any(choice.get("text") for choice in event["choices"]):
                now = time.perf_counter()
                if first:
                    gaps.append(now - last)
                first, last = first or now, now
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            server_ms = _milliseconds(event.get("timings")) or server_ms
    if not first:
        raise LoadFailed("the stream ended without a token")
    return Answer(first - sent, last - sent, tokens, gaps_s=tuple(gaps), server_ms=server_ms)


def _milliseconds(timings: Mapping[str, float] | None) -> dict[str, float]:
    """Of an event's `timings`, as Headrace and llama.cpp send them, those that are milliseconds."""
    return {name.removesuffix("_ms"): value for name, value in (timings or {}).items() if name.endswith("_ms")}


def _summarize(row: Row, seed: int, requests: Sequence[Request], answers: Sequence[Answer], wall_s: float) -> RowResult:
    ttft = [answer.ttft_s for answer in answers]
    return RowResult(
        row=row.name,
        seed=seed,
        output_tokens_per_s=sum(answer.tokens for answer in answers) / wall_s,
        prompt_tokens_per_s=sum(_token_count(request) for request in requests) / wall_s,
        ttft_p50_ms=quantile(ttft, 0.5) * 1e3,
        ttft_p99_ms=quantile(ttft, 0.99) * 1e3,
        inter_token_p50_ms=quantile([answer.inter_token_s for answer in answers], 0.5) * 1e3,
        wall_s=wall_s,
        short_answers=sum(answer.tokens != request.output for request, answer in zip(requests, answers, strict=True)),
        server_ms={
            name: quantile([answer.server_ms.get(name, 0.0) for answer in answers], 0.5)
            for name in answers[0].server_ms
        },
    )


def _token_count(request: Request) -> int:
    return 0 if isinstance(request.prompt, str) else len(request.prompt)


def quantile(values: Sequence[float], fraction: float) -> float:
    """Nearest-rank quantile: the least value that so large a share of all is not above."""
    return sorted(values)[max(0, math.ceil(fraction * len(values)) - 1)]
