"""Callers that stream deterministic completions one after the other, and know every answer beforehand."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import aiohttp

End = Literal["finished", "error", "broken", "lost", "wrong", "refused"]
"""How a request ended for its caller. finished: whole, and with the tokens that were due; wrong: whole, with others;
error: told so; refused: never accepted, told when to come again or not reached; broken: cut off; lost: silence."""

ENDS: tuple[End, ...] = get_args(End)

_SILENCE_S = 90.0
_RETRY_S = 0.25


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt of token ids, and how many tokens to write."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(slots=True)
class Seen:
    """What all callers saw together."""

    ends: dict[End, int] = field(default_factory=lambda: dict.fromkeys(ENDS, 0))
    longest_pause_s: float = 0.0
    """From one event of a stream to the next."""
    longest_wait_s: float = 0.0
    """For the first event."""
    notes: list[str] = field(default_factory=list)
    """What errors and wrong answers said."""

    @property
    def accepted(self) -> int:
        return sum(self.ends.values()) - self.ends["refused"]

    def note(self, end: End, what: str) -> None:
        self.ends[end] += 1
        if end not in ("finished", "refused"):
            self.notes.append(f"{end}: {what}")


class Callers:
    """So many at once, until they are told to stop."""

    def __init__(self, url: str, model: str, questions: Sequence[Question], at_once: int) -> None:
        self._url = url
        self._model = model
        self._questions = questions
        self._at_once = at_once
        self._answers: dict[int, str] = {}
        self._stopping = False

    async def learn(self) -> None:
        """Asks every question once, undisturbed: these are the answers."""
        async with self._session() as session:
            for number in range(len(self._questions)):
                seen = Seen()
                self._answers[number] = await self._ask(session, number, seen)
                assert seen.ends["finished"] == 1, seen.notes

    async def run(self) -> Seen:
        """Asks until `stop`; returns when every answer has ended."""
        seen, self._stopping = Seen(), False
        async with self._session() as session:
            await asyncio.gather(*(self._call(session, first, seen) for first in range(self._at_once)))
        return seen

    def stop(self) -> None:
        self._stopping = True

    async def _call(self, session: aiohttp.ClientSession, number: int, seen: Seen) -> None:
        while not self._stopping:
            refused = seen.ends["refused"]
            await self._ask(session, number % len(self._questions), seen)
            number += self._at_once
            if seen.ends["refused"] > refused:
                await asyncio.sleep(_RETRY_S)

    async def _ask(self, session: aiohttp.ClientSession, number: int, seen: Seen) -> str:
        """Asks one question, and notes how that went; the answer's text."""
        question = self._questions[number]
        body = {
            "model": self._model,
            "prompt": question.prompt,
            "max_tokens": question.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "deterministic": True,
        }
        texts: list[str] = []
        began = time.monotonic()
        try:
            async with session.post(f"{self._url}/v1/completions", json=body) as reply:
                if reply.status == 200:
                    end, what = await _read(reply, began, texts, seen)
                else:
                    end, what = _refusal(reply), await reply.text()
        except aiohttp.ClientConnectorError as error:
            end, what = "refused", str(error)
        except aiohttp.ClientError as error:
            end, what = "broken", f"{type(error).__name__} {error}"
        except TimeoutError:
            end, what = "lost", f"nothing came for {_SILENCE_S:g} s"
        text = "".join(texts)
        if end == "finished" and text != self._answers.get(number, text):
            end, what = "wrong", f"question {number} got {text!r}, and {self._answers[number]!r} was due"
        seen.note(end, what)
        return text

    def _session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=_SILENCE_S)
        return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(force_close=True))


async def _read(reply: aiohttp.ClientResponse, began: float, texts: list[str], seen: Seen) -> tuple[End, str]:
    """Reads a stream to its end."""
    last = 0.0
    finished = False
    async for raw in reply.content:
        line = raw.decode().strip()
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            return ("finished", "") if finished else ("error", "[DONE] without a finish reason")
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            return "error", line
        now = time.monotonic()
        if last:
            seen.longest_pause_s = max(seen.longest_pause_s, now - last)
        else:
            seen.longest_wait_s = max(seen.longest_wait_s, now - began)
        last = now
        texts += [choice["text"] for choice in event["choices"]]
        finished = finished or any(choice["finish_reason"] for choice in event["choices"])
    return "broken", "the stream ended in the middle"


def _refusal(reply: aiohttp.ClientResponse) -> End:
    return "refused" if reply.status in (429, 503) and "Retry-After" in reply.headers else "error"
