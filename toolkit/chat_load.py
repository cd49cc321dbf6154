"""A closed loop of streamed chats from a process of its own, light enough to stand beside what it measures.

`python -m toolkit.chat_load JSON` (a `ChatLoad`) prints `measure` once it is warm, `end` when the time is over or the
requests are done, then a `ChatResult` as JSON. Speaks HTTP/1.1 over plain sockets: a client library would take as much
of the CPU as a gateway does.
"""

import asyncio
import json
import random
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

import uvloop

_PASSAGE = (
    "A mill on a river lives by its headrace, the channel that leads water from the weir to the wheel. Whoever digs "
    "one has to find the slope that keeps the water moving without letting it tear at the banks, and a gate at the "
    "upper end that can be closed before a flood comes down. Leaves and ice are kept out by a rack of iron bars, "
    "which somebody rakes clean every morning in autumn. Old millers judged the flow by ear and opened the gate a "
    "hand's width at a time; a modern plant measures pressure and level and lets a motor do it. "
    "Question {number}: say in two sentences what this passage tells about water."
)
# Streams begin one after the other: a crowd that comes at once to an idle server may be turned away.
_APART_S = 0.01
_TOKEN = re.compile(rb'"content": ?"[^"]')
LAST_CHUNK = b"0\r\n\r\n"


class ChatsFailed(Exception):
    """The server answered with an error, or hung up; the message has what it said."""


@dataclass(frozen=True, slots=True)
class ChatLoad:
    """What to ask, and for how long."""

    url: str
    model: str
    key: str
    # Chats at a time, and the tokens of each answer.
    streams: int
    tokens: int
    # Seconds before anything is measured, and seconds of the measurement; or else so many requests.
    warm_s: float
    measured_s: float
    requests: int | None = None


@dataclass(slots=True)
class ChatResult:
    """What the clients saw of the answers that ended within the measurement."""

    seconds: float = 0.0
    requests: int = 0
    # Events with text. Fewer than tokens where a server puts several into one, or a token has no text.
    events: int = 0
    # To the first event. That may be one without text: a special token has none.
    ttft_s: list[float] = field(default_factory=list)


class ChatStream(asyncio.Protocol):
    """One connection, which asks again as soon as it has its answer."""

    def __init__(self, run: "ChatRun") -> None:
        self._run = run
        self._tail = b""
        self._sent_at = 0.0
        self._begun = False
        self._status_seen = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        if not self._status_seen:
            self._status_seen = True
            if not data.startswith(b"HTTP/1.1 200"):
                self._run.fail(data.decode(errors="replace")[:500])
                return
        if not self._begun and b"data: " in data:
            self._begun = True
            self._run.result.ttft_s.append(time.perf_counter() - self._sent_at)
        self._run.result.events += len(_TOKEN.findall(data))
        self._tail = (self._tail + data[-len(LAST_CHUNK) :])[-len(LAST_CHUNK) :]
        if self._tail == LAST_CHUNK:
            self._run.answered()
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.fail(f"the server hung up: {exc}")

    def _ask(self) -> None:
        self._tail, self._begun, self._status_seen = b"", False, False
        request = self._run.next_request()
        self._sent_at = time.perf_counter()
        self._transport.write(request)


class ChatRun:
    """One run: its streams, and what they have seen."""

    def __init__(self, load: ChatLoad) -> None:
        self.result = ChatResult()
        self._load = load
        # Of the newest question: no run asks what another one has asked.
        self._number = random.randrange(10**8, 10**9)
        # Answers that are still to be measured; None: not a number of them.
        self._left: int | None = None
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> ChatResult:
        """Raises ChatsFailed, OSError."""
        loop = asyncio.get_running_loop()
        address = (urlsplit(self._load.url).hostname or "", urlsplit(self._load.url).port or 80)
        transports = []
        for _ in range(self._load.streams):
            transport, _ = await loop.create_connection(lambda: ChatStream(self), *address)
            transports.append(transport)
            await self._wait(_APART_S)
        await self._wait(self._load.warm_s)
        self.result, self._left = ChatResult(), self._load.requests
        print("measure", flush=True)
        started = time.perf_counter()
        await self._wait(self._load.measured_s)
        measured, self.result = self.result, ChatResult()
        measured.seconds = time.perf_counter() - started
        print("end", flush=True)
        if not self._done.done():
            self._done.set_result(None)
        for transport in transports:
            transport.abort()
        return measured

    def next_request(self) -> bytes:
        """The bytes of a chat that nobody has asked yet."""
        self._number += 1
        return chat_request(self._load, self._number)

    def answered(self) -> None:
        """An answer has ended. What comes after the last one that counts does not."""
        if self._done.done():
            return
        self.result.requests += 1
        if self._left is not None:
            self._left -= 1
            if not self._left and not self._done.done():
                self._done.set_result(None)

    def fail(self, reason: str) -> None:
        if not self._done.done():
            self._done.set_exception(ChatsFailed(reason))

    async def _wait(self, seconds: float) -> None:
        """Returns after that time, or when the requests are done. Raises ChatsFailed."""
        await asyncio.wait([self._done], timeout=seconds)
        if self._done.done():
            self._done.result()


def chat_request(load: ChatLoad, number: int) -> bytes:
    """The bytes of an HTTP request; those of different numbers differ in their last words."""
    content = _PASSAGE.format(number=number)
    body = {"model": load.model, "messages": [{"role": "user", "content": content}], "stream": True}
    body |= {"max_tokens": load.tokens, "temperature": 0, "ignore_eos": True}
    encoded = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {urlsplit(load.url).netloc}\r\n"
    head += f"authorization: Bearer {load.key}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(encoded)}\r\n\r\n".encode() + encoded


def main(argument: str) -> None:
    try:
        result = uvloop.run(_run(ChatLoad(**json.loads(argument))))
    except (ChatsFailed, OSError) as error:
        sys.exit(f"chats: {error}")
    print(json.dumps(asdict(result)))


async def _run(load: ChatLoad) -> ChatResult:
    return await ChatRun(load).run()


if __name__ == "__main__":
    main(sys.argv[1])
