"""Many callers at once, of one key or of several, over several gateways, and what each of them saw."""

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

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
    # The sentence that refused it.
    refusal: str = ""
    broken: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    # Tokens of its prompt, and those that it asked for.
    most: tuple[int, int] = (0, 0)
    # Counted from 0.
    gateway: int = 0
    # Its gateway was killed afterwards.
    before_the_kill: bool = False

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def at_most(self) -> "Call":
        """As it may have been charged: in full, if its gateway was killed before it told Redis of the end."""
        if self.refusal or not self.before_the_kill:
            return self
        prompt_tokens, completion_tokens = self.most
        first = self.first or self.sent
        return replace(self, first=first, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)


class Hammer:
    """`CLIENTS` callers, each of whom makes its calls one after the other and takes no refusal for an answer."""

    def __init__(
        self, urls: Sequence[str], keys: Sequence[str], body: Callable[[random.Random], dict[str, Any]]
    ) -> None:
        """`urls`: of the gateways' APIs, `/v1` included. `keys`: the callers' in turn. `body`: of a completion."""
        self._urls = urls
        self._keys = keys
        self._body = body
        self.calls: list[Call] = []
        # Set when a tenth of all calls have been made.
        self.in_full_swing = asyncio.Event()

    async def run(self, calls_each: int) -> list[Call]:
        """All calls, in the order in which they were sent."""
        connector = aiohttp.TCPConnector(limit=CLIENTS)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(self._client(session, number, calls_each) for number in range(CLIENTS)))
        return self.calls

    def note_killed(self, gateway: int) -> None:
        for call in self.calls:
            call.before_the_kill = call.gateway == gateway

    async def _client(self, session: aiohttp.ClientSession, number: int, calls_each: int) -> None:
        draw = random.Random(number)
        headers = {"authorization": f"Bearer {self._keys[number % len(self._keys)]}"}
        for turn in range(calls_each):
            body = self._body(draw)
            most = (len(body["prompt"]), body["max_tokens"])
            call = Call(time.monotonic(), most=most, gateway=(number + turn) % len(self._urls))
            self.calls.append(call)
            try:
                await self._call(session, headers, body, call)
            except aiohttp.ClientError:
                call.broken = True
            if len(self.calls) >= CLIENTS * calls_each // 10:
                self.in_full_swing.set()

    async def _call(
        self, session: aiohttp.ClientSession, headers: dict[str, str], body: dict[str, Any], call: Call
    ) -> None:
        url = f"{self._urls[call.gateway]}/completions"
        options = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with session.post(url, json=options, headers=headers) as response:
            if response.status == _REFUSED:
                assert int(response.headers["retry-after"]) > 0
                call.refusal = (await response.json())["error"]["message"]
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


def taken_and_asked(refusal: str) -> tuple[Decimal, Decimal]:
    """What of the limit was used or held, and what the call would have taken beside that, as its refusal says."""
    taken = re.findall(r"([0-9.]+) are (?:used|held|unfinished)", refusal)
    assert taken, refusal
    asked = re.search(r"may take ([0-9.]+)", refusal)
    return sum(map(Decimal, taken), Decimal(0)), Decimal(asked[1] if asked else 1)


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
