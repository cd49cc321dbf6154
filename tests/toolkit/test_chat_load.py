"""The light client, against a server that answers in pieces of its own choosing."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from toolkit.chat_load import ChatLoad, ChatResult, ChatRun, ChatsFailed, chat_request

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
FIRST = b'18\r\ndata: {"content":""}\n\n\r\n'
TOKEN = b'19\r\ndata: {"content":"x"}\n\n\r\n'
PAIR = b'19\r\ndata: {"content": "x"}\n\n\r\n'


@asynccontextmanager
async def server(pieces: Sequence[bytes]) -> AsyncIterator[ChatLoad]:
    """Answers every request with these pieces, each sent by itself."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length"))
                await reader.readexactly(int(length.split(b":")[1]))
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        yield ChatLoad(f"http://127.0.0.1:{port}", "m", "k", streams=2, tokens=2, warm_s=0, measured_s=60, requests=20)


async def ask(*pieces: bytes) -> ChatResult:
    async with server(pieces) as load:
        return await ChatRun(load).run()


async def test_counts_answers_and_events_with_text(capsys: pytest.CaptureFixture[str]) -> None:
    result = await ask(HEAD, FIRST, TOKEN + PAIR, b"0\r\n", b"\r\n")
    assert result.requests == 20
    # Either stream's first request may begin before what is measured does.
    assert len(result.ttft_s) >= 18 and min(result.ttft_s) > 0
    assert result.events >= 2 * len(result.ttft_s)
    assert capsys.readouterr().out.splitlines() == ["measure", "end"]


async def test_an_error_is_told() -> None:
    with pytest.raises(ChatsFailed, match="too many"):
        await ask(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 8\r\n\r\ntoo many")


def test_chats_differ_at_their_end() -> None:
    load = ChatLoad("http://127.0.0.1:1", "m", "k", 1, 7, 0, 0)
    first, second = (json.loads(chat_request(load, number).partition(b"\r\n\r\n")[2]) for number in (1, 2))
    one, other = first["messages"][0]["content"], second["messages"][0]["content"]
    assert one != other and one.replace("Question 1:", "Question 2:") == other
    assert 100 < len(one.split()) < 130
    assert (first["max_tokens"], first["stream"], first["ignore_eos"]) == (7, True, True)
