"""Many callers of one key at once, over several gateways, and what each of them saw."""

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import aiohttp

CLIENTS = 64
_REFUSED = 429
_NOT_READY = 503


@dataclass(slots=True)
class Call:
    """One streamed completion. Times are the client's own, in seconds; None: it never came to that."""

    sent: float
    first: float | None = None
    last: float | None = None
    refused: bool = False
    broken: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Hammer:
    """`CLIENTS` callers, each of whom makes its calls one after the other and takes no refusal for an answer."""

    def __init__(self, urls: Sequence[str], key: str, body: Callable[[random.Random], dict[str, object]]) -> None:
        """`urls`: of the gateways' APIs, `/v1` included. `body`: of a completion."""
        self._urls = urls
        self._headers = {"authorization": f"Bearer {key}"}
        self._body = body
        self.calls: list[Call] = []
        # Set when a tenth of all calls have been made.
        self.in_full_swing = asyncio.Event()

    async def run(self, calls_each: int) -> list[Call]:
        """All calls, in the order in which they were sent."""
        connector = aiohttp.TCPConnector(limit=CLIENTS)
        async with aiohttp.ClientSession(connector=connector, headers=self._headers) as session:
            await asyncio.gather(*(self._client(session, number, calls_each) for number in range(CLIENTS)))
        return self.calls

    async def _client(self, session: aiohttp.ClientSession, number: int, calls_each: int) -> None:
        draw = random.Random(number)
        for turn in range(calls_each):
            call = Call(time.monotonic())
            self.calls.append(call)
            try:
                await self._call(session, self._urls[(number + turn) % len(self._urls)], self._body(draw), call)
            except aiohttp.ClientError:
                call.broken = True
            if len(self.calls) >= CLIENTS * calls_each // 10:
                self.in_full_swing.set()

    async def _call(self, session: aiohttp.ClientSession, url: str, body: dict[str, object], call: Call) -> None:
        options = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with session.post(f"{url}/completions", json=options) as response:
            if response.status == _REFUSED:
                assert int(response.headers["retry-after"]) > 0
                call.refused = True
                return
            if response.status == _NOT_READY:  # a gateway that has just been started again
                call.broken = True
                return
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _note(call, json.loads(line[6:]))


def _note(call: Call, event: dict[str, object]) -> None:
    """An event of the answer. The usage comes last of all."""
    assert "error" not in event, event
    call.last = time.monotonic()
    call.first = call.first or call.last
    if usage := event.get("usage"):
        assert isinstance(usage, dict)
        call.prompt_tokens, call.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]


def most_at_once(calls: Sequence[Call]) -> int:
    """Answers that were certainly under way together: between the first and the last event that came of each."""
    turns = [(call.first, 1) for call in calls if call.first] + [(call.last, -1) for call in calls if call.last]
    running = most = 0
    for _, change in sorted(turns):  # at the same time an end comes before a beginning
        running += change
        most = max(most, running)
    return most


def within(calls: Sequence[Call], window_s: float, amount: Callable[[Call], int]) -> Iterator[int]:
    """What was certainly taken within each window that begins with a call: by those sent and answered inside it."""
    answered = [call for call in calls if call.last is not None and not call.broken]
    for begin in answered:
        yield sum(
            amount(call)
            for call in answered
            if call.sent >= begin.sent and call.last is not None and call.last < begin.sent + window_s
        )
