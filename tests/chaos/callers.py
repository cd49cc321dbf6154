"""Callers that stream deterministic completions one after the other, and know every answer beforehand.

Those that ask for resumable ones come back when they are cut off, each time to the next gateway: with the id of the
newest event, or before the first one with the same idempotency key.
"""

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import Iterator, Sequence
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


@dataclass(slots=True)
class Answer:
    """What one caller has of its answer, over one connection or several."""

    seen: Seen
    began: float = field(default_factory=time.monotonic)
    last: float = 0.0
    texts: list[str] = field(default_factory=list)
    event_id: str = ""
    """Of the newest event."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    finished: bool = False

    @property
    def newest(self) -> float:
        """When something was last heard of it."""
        return self.last or self.began

    async def read(self, reply: aiohttp.ClientResponse) -> tuple[End, str]:
        """Reads a stream to its end."""
        async for raw in reply.content:
            line = raw.decode().strip()
            if line.startswith("id: "):
                self.event_id = line.removeprefix("id: ")
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return ("finished", "") if self.finished else ("error", "[DONE] without a finish reason")
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return "error", line
            self._take(event["choices"])
        return "broken", "the stream ended in the middle"

    def _take(self, choices: list[dict[str, str]]) -> None:
        now = time.monotonic()
        if self.last:
            self.seen.longest_pause_s = max(self.seen.longest_pause_s, now - self.last)
        else:
            self.seen.longest_wait_s = max(self.seen.longest_wait_s, now - self.began)
        self.last = now
        self.texts += [choice["text"] for choice in choices]
        self.finished = self.finished or any(choice["finish_reason"] for choice in choices)


class Callers:
    """So many at once, until they are told to stop."""

    def __init__(
        self, urls: Sequence[str], model: str, questions: Sequence[Question], at_once: int, *, resumable: bool = False
    ) -> None:
        """They ask the first of the URLs; those of resumable answers come back to each in turn."""
        self._urls = urls
        self._model = model
        self._questions = questions
        self._at_once = at_once
        self._resumable = resumable
        self._answers: dict[int, str] = {}
        self._stopping = False

    def resumable(self) -> "Callers":
        """The same callers with resumable answers."""
        callers = Callers(self._urls, self._model, self._questions, self._at_once, resumable=True)
        callers._answers = self._answers
        return callers

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
        answer, urls = Answer(seen), itertools.cycle(self._urls)
        end, what = await self._connect(session, number, answer, urls)
        comes_back = self._resumable and end == "broken"
        while comes_back and end in ("broken", "refused") and time.monotonic() < answer.newest + _SILENCE_S:
            await asyncio.sleep(_RETRY_S)
            end, what = await self._connect(session, number, answer, urls)
        text = "".join(answer.texts)
        if end == "finished" and text != self._answers.get(number, text):
            end, what = "wrong", f"question {number} got {text!r}, and {self._answers[number]!r} was due"
        seen.note(end, what)
        return text

    async def _connect(
        self, session: aiohttp.ClientSession, number: int, answer: Answer, urls: Iterator[str]
    ) -> tuple[End, str]:
        """Asks, or comes back for the rest, over one connection."""
        question = self._questions[number]
        body = {
            "model": self._model,
            "prompt": question.prompt,
            "max_tokens": question.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "deterministic": True,
            "resumable": self._resumable,
        }
        headers = {"Idempotency-Key": answer.key} if self._resumable else {}
        if answer.event_id:
            headers["Last-Event-ID"] = answer.event_id
        try:
            async with session.post(f"{next(urls)}/v1/completions", json=body, headers=headers) as reply:
                if reply.status == 200:
                    return await answer.read(reply)
                return _refusal(reply), await reply.text()
        except aiohttp.ClientConnectorError as error:
            return "refused", str(error)
        except aiohttp.ClientError as error:
            return "broken", f"{type(error).__name__} {error}"
        except TimeoutError:
            return "lost", f"nothing came for {_SILENCE_S:g} s"

    def _session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=_SILENCE_S)
        return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(force_close=True))


def _refusal(reply: aiohttp.ClientResponse) -> End:
    return "refused" if reply.status in (429, 503) and "Retry-After" in reply.headers else "error"
