"""Decodes beside a stream of long prompts: on one worker, whole prompts or chunks; and on separate workers.

Every way has the same cores. What the clients of the decodes see (time between tokens), and how fast prompts are
computed meanwhile, is the gain and the price of disaggregation on one small machine.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.common.channel import cancel_and_wait
from toolkit.bench_stack import stack_of_our_own
from toolkit.loadtest import Answer, Request, Row, complete, draw_requests, first_model, open_session, quantile

_DECODES = Row("decodes", requests=8, concurrency=8, shared_prefix=0, unique_prompt=32, output=48)
_WINDOW_S = 60.0  # at least; every decode that began then is finished beside prompts
_TIMEOUT_S = 600.0

WAYS = {
    "one worker, whole prompts": ("--workers", "1", "--max-batch-tokens", "4096"),
    "one worker, chunks": ("--workers", "1"),
    "prefill and decode worker": ("--prefill-workers", "1", "--decode-workers", "1"),
}


@dataclass(frozen=True, slots=True)
class SplitRow:
    """What the decodes' clients saw while prompts arrived, and the rates of both."""

    way: str
    between_tokens_p50_ms: float
    between_tokens_p99_ms: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float


async def run_split_bench(prompt_tokens: int, up_arguments: Sequence[str], folder: Path) -> list[SplitRow]:
    """One stack after the other. Raises StackEnded, LoadFailed."""
    rows = []
    for way, arguments in WAYS.items():
        log = folder / "split.log"
        async with stack_of_our_own(way, (*arguments, *up_arguments), log) as server:
            rows.append(await _measure(way, server.url, prompt_tokens))
    return rows


async def _measure(way: str, url: str, prompt_tokens: int) -> SplitRow:
    model = await first_model(url)
    _, *decodes = draw_requests(_DECODES, seed=1)
    prompts = draw_requests(Row("prompts", 200, 1, 0, prompt_tokens, 1), seed=2)
    prompt_ends: list[float] = []
    answers: list[Answer] = []
    async with open_session(url, _TIMEOUT_S) as session:

        async def send_prompts() -> None:
            for prompt in prompts:
                await complete(session, model, prompt)
                prompt_ends.append(time.perf_counter())

        async def decode(request: Request) -> None:
            while not prompt_ends or prompt_ends[-1] < started + _WINDOW_S:
                answers.append(await complete(session, model, request))

        await complete(session, model, prompts.pop())  # warm: connections, rates
        started = time.perf_counter()
        sending = asyncio.create_task(send_prompts())
        await asyncio.gather(*(decode(request) for request in decodes))
        wall_s = time.perf_counter() - started
        await cancel_and_wait([sending])
    gaps = [gap for answer in answers for gap in answer.gaps_s]
    return SplitRow(
        way=way,
        between_tokens_p50_ms=quantile(gaps, 0.5) * 1e3,
        between_tokens_p99_ms=quantile(gaps, 0.99) * 1e3,
        output_tokens_per_s=sum(answer.tokens for answer in answers) / wall_s,
        prompt_tokens_per_s=len(prompt_ends) * prompt_tokens / (prompt_ends[-1] - started),
    )
