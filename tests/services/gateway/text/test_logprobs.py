"""Log-probabilities through the whole gateway: OpenAI's shapes, and every token with its own."""

import asyncio
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI

from headrace.v1.sampling_pb2 import FinishReason, Logprobs, Stopping
from services.common.errors import RequestFailed
from services.gateway.http.openai_logprobs import chat_logprobs, completion_logprobs
from services.gateway.request import Delta
from services.gateway.text.choice import Choice
from services.gateway.text.logprobs import LogprobReader
from services.gateway.text.tokenization import ModelTokenizer
from tests.services.gateway.fakes import MODEL, FakeWorker, logprobs_of, says
from tests.services.gateway.stack import TEXT, Stack, running_gateway, running_stack
from tests.services.gateway.tokenizers_for_tests import bundle, byte_level_tokenizer

TOKENIZER = ModelTokenizer(bundle())
IDS = [*byte_level_tokenizer().encode(TEXT).ids, byte_level_tokenizer().token_to_id("<|im_end|>")]
LISTS = ("text_offset", "token_logprobs", "tokens", "top_logprobs")


def new_choice(stopping: Stopping) -> Choice:
    return Choice(0, TOKENIZER.detokenizer(), stopping, reader())


def reader() -> LogprobReader:
    return LogprobReader(TOKENIZER.detokenizer(), TOKENIZER.spelling.bytes_of)


def spelled(token_ids: list[int]) -> str:
    return b"".join(map(TOKENIZER.spelling.bytes_of, token_ids)).decode()


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=8), st.lists(st.sampled_from(["fox", "🦊 j", "z", "dog. Z"]), max_size=2))
def test_how_tokens_are_cut_into_steps_changes_nothing(cuts: list[int], stops: list[str]) -> None:
    choice, deltas, begin = new_choice(Stopping(stop=stops)), list[Delta](), 0
    for length in [*cuts, len(IDS)]:
        if not choice.finished:
            last = length == len(IDS)
            part = IDS[begin : begin + length]
            reason = FinishReason.FINISH_REASON_LENGTH if last else FinishReason.FINISH_REASON_UNSPECIFIED
            deltas.append(choice.advance(part, reason, logprobs_of(part, begin, 2)))
            begin += length
    whole = completion_logprobs(deltas)
    chat = chat_logprobs(deltas)
    assert whole is not None and chat is not None
    assert whole.token_logprobs == [-at / 8 for at in range(len(choice.token_ids))]
    assert b"".join(bytes(token.bytes) for token in chat.content).decode() == spelled(choice.token_ids)
    for token_id, offset in zip(choice.token_ids, whole.text_offset, strict=True):
        if (text := TOKENIZER.spelling.bytes_of(token_id)).isascii() and token_id != IDS[-1]:
            assert TEXT[offset : offset + len(text)] == text.decode()


def test_parts_of_characters_are_escaped() -> None:
    ids = byte_level_tokenizer().encode("🦊").ids
    delta = new_choice(Stopping()).advance(ids, FinishReason.FINISH_REASON_LENGTH, logprobs_of(ids, 0, 0))
    whole, chat = completion_logprobs([delta]), chat_logprobs([delta])
    assert whole is not None and chat is not None
    assert whole.tokens == [r"bytes:\xf0", r"bytes:\x9f", r"bytes:\xa6", r"bytes:\x8a"]
    assert [token.token for token in chat.content] == [r"\xf0", r"\x9f", r"\xa6", r"\x8a"]
    assert whole.text_offset == [0, 0, 0, 0]


def test_what_has_no_likelihood_is_a_number_that_json_has() -> None:
    values = Logprobs(token_logprobs=[-math.inf], top_ids=[5], top_logprobs=[-math.inf])
    delta = new_choice(Stopping()).advance([40], FinishReason.FINISH_REASON_LENGTH, values)
    whole = completion_logprobs([delta])
    assert whole is not None
    assert whole.token_logprobs == [-9999.0] and set(whole.top_logprobs[0].values()) == {-9999.0}


def test_a_worker_that_leaves_them_out_fails() -> None:
    with pytest.raises(RequestFailed, match="left out"):
        reader().read(None, [1])
    with pytest.raises(RequestFailed, match="left out"):
        reader().read(logprobs_of([1], 0, 0), [1, 2])
    assert reader().read(None, []) is None


async def test_a_completion_has_them_whole_and_streamed(stack: Stack) -> None:
    body = (await stack.complete(logprobs=2)).json()
    [choice] = body["choices"]
    whole = choice["logprobs"]
    assert choice["text"] == TEXT and list(whole) == list(LISTS)
    assert len(whole["tokens"]) == body["usage"]["completion_tokens"] == len(IDS)
    assert whole["token_logprobs"] == [-at / 8 for at in range(len(IDS))]
    assert whole["tokens"][:2] == ["Once", " upon"] and whole["tokens"][-1] == "<|im_end|>"
    assert whole["text_offset"][:3] == [0, 4, 9] and whole["text_offset"][-1] == len(TEXT)
    assert all(
        len(top) in (1, 2) and token in top for token, top in zip(whole["tokens"], whole["top_logprobs"], strict=True)
    )
    lines = (await stack.complete(logprobs=2, stream=True)).text.split("\n\n")[:-2]
    parts = [json.loads(line.removeprefix("data: "))["choices"][0]["logprobs"] for line in lines]
    assert {name: [item for part in parts if part for item in part[name]] for name in LISTS} == whole
    assert (await stack.complete(logprobs=0)).json()["choices"][0]["logprobs"]["top_logprobs"][3] == {
        whole["tokens"][3]: -3 / 8
    }


async def test_the_official_client_reads_a_chats(stack: Stack) -> None:
    client = AsyncOpenAI(base_url=stack.base_url + "/v1", api_key="none")
    messages = [{"role": "user", "content": "hello"}]
    whole = await client.chat.completions.create(  # type: ignore[call-overload]
        model=MODEL, messages=messages, logprobs=True, top_logprobs=3
    )
    content = whole.choices[0].logprobs.content
    assert bytes(byte for token in content for byte in token.bytes).decode() == TEXT + "<|im_end|>"
    assert [token.logprob for token in content] == [-at / 8 for at in range(len(IDS))]
    assert [top.logprob for top in content[2].top_logprobs] == [-2 / 8, -2 / 8 - 1, -2 / 8 - 2]
    assert content[2].top_logprobs[0].token == content[2].token
    stream = await client.chat.completions.create(  # type: ignore[call-overload]
        model=MODEL, messages=messages, logprobs=True, stream=True
    )
    streamed = [token async for chunk in stream for token in chunk.choices[0].logprobs.content]
    assert [(token.token, token.logprob) for token in streamed] == [(token.token, token.logprob) for token in content]
    assert not any(token.top_logprobs for token in streamed)
    await client.close()


async def test_what_a_stop_string_cuts_off_has_none(redis_url: str) -> None:
    async with running_stack(redis_url, [FakeWorker("w0", says(TEXT), tokens_per_step=7)]) as stack:
        body = (await stack.complete(logprobs=1, stop="quick")).json()
        assert len(body["choices"][0]["logprobs"]["tokens"]) == body["usage"]["completion_tokens"]
        assert "".join(body["choices"][0]["logprobs"]["tokens"]).endswith("quick")


async def test_they_go_on_on_another_worker(redis_url: str) -> None:
    workers = [FakeWorker("w0", says(TEXT), break_after=9), FakeWorker("w1", says(TEXT))]
    async with running_stack(redis_url, workers) as stack:
        body = (await stack.complete(logprobs=1)).json()
        assert body["choices"][0]["logprobs"]["token_logprobs"] == [-at / 8 for at in range(len(IDS))]
        assert len(workers[1].starts) == 1


async def test_a_recorded_answer_keeps_them(stack: Stack, redis_url: str) -> None:
    fields = {"logprobs": 2, "stream": True, "resumable": True}
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 100, **fields}
    whole = [line for line in (await stack.complete(**fields)).text.split("\n") if line.startswith(("id: ", "data: {"))]
    await stack.settled()
    async with running_gateway(redis_url, stack.scheduler, stack.workers, id="other") as other:
        headers = {"last-event-id": whole[0].removeprefix("id: ")}
        rest = (await other.http.post("/v1/completions", json=body, headers=headers)).text
    expected = [json.loads(line.removeprefix("data: "))["choices"] for line in whole[3::2]]
    lines = [line for line in rest.split("\n") if line.startswith("data: {")]
    assert [json.loads(line.removeprefix("data: "))["choices"] for line in lines] == expected


async def test_those_that_do_not_ask_have_none_beside_those_that_do(stack: Stack) -> None:
    asks, does_not = await asyncio.gather(stack.complete(logprobs=1), stack.complete())
    assert asks.json()["choices"][0]["logprobs"] is not None
    assert does_not.json()["choices"][0]["logprobs"] is None
    assert not stack.workers[0].starts[1].sampling.HasField("logprobs")
