import asyncio
import json
import re

import httpx
import pytest
from openai import AsyncOpenAI

from services.gateway.http.openai_events import COMMENT
from tests.services.gateway.fakes import BLOCK_SIZE, CONTEXT, MODEL, FakeWorker, says, unpack
from tests.services.gateway.stack import TEXT, Stack, running_stack
from tests.services.gateway.tokenizers_for_tests import byte_level_tokenizer

TOKENS = len(byte_level_tokenizer().encode(TEXT).ids)


def events(response: httpx.Response) -> list[dict[str, object]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[line.index("data: ") + 6 :]) for line in lines[:-1]]


async def test_a_completion(stack: Stack) -> None:
    response = await stack.complete("hello world")
    assert response.status_code == 200
    body = response.json()
    prompt_tokens = len(byte_level_tokenizer().encode("hello world").ids)
    assert body["choices"] == [{"index": 0, "text": TEXT, "finish_reason": "stop", "logprobs": None}]
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": TOKENS + 1,  # the end-of-sequence token counts
        "total_tokens": prompt_tokens + TOKENS + 1,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert body["object"] == "text_completion"
    assert body["id"] == "cmpl-" + response.headers["x-request-id"]
    await stack.settled()


async def test_a_streamed_completion_is_the_same_text(stack: Stack) -> None:
    response = await stack.complete(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT  # type: ignore[index]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"  # type: ignore[index]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_whole_and_streamed_answers_have_the_same_fingerprint(stack: Stack) -> None:
    whole = (await stack.complete()).json()["system_fingerprint"]
    assert re.fullmatch("fp_[0-9a-f]{12}", whole)
    for fields in ({}, {"resumable": True}):
        chunks = events(await stack.complete(stream=True, **fields))
        assert {chunk["system_fingerprint"] for chunk in chunks} == {whole}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    assert (await stack.http.post("/v1/chat/completions", json=chat)).json()["system_fingerprint"] == whole


async def test_usage_comes_last_when_asked_for(stack: Stack) -> None:
    stack.workers[0].cached_prompt_tokens = 4
    chunks = events(await stack.complete("hello world", stream=True, stream_options={"include_usage": True}))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens"] == TOKENS + 1  # type: ignore[index,call-overload]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}  # type: ignore[index,call-overload]


async def test_the_official_client_chats(stack: Stack) -> None:
    client = AsyncOpenAI(base_url=stack.base_url + "/v1", api_key="none")
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hello"}]
    whole = await client.chat.completions.create(model=MODEL, messages=messages)  # type: ignore[call-overload]
    assert whole.choices[0].message.content == TEXT
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "stop"
    stream = await client.chat.completions.create(  # type: ignore[call-overload]
        model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == TEXT
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert chunks[-1].usage.completion_tokens == TOKENS + 1
    prompt = byte_level_tokenizer().decode(unpack(stack.workers[0].starts[0].prompt_ids), skip_special_tokens=False)
    assert prompt == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    await client.close()


async def test_the_official_client_completes_and_lists(stack: Stack) -> None:
    client = AsyncOpenAI(base_url=stack.base_url + "/v1", api_key="none")
    whole = await client.completions.create(model=MODEL, prompt="hello", max_tokens=3)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 3
    stream = await client.completions.create(model=MODEL, prompt="hello", max_tokens=100, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    await client.close()


async def test_completions_get_16_tokens_by_default_and_chats_the_rest_of_the_context(stack: Stack) -> None:
    body = {"model": MODEL, "prompt": "hello"}
    assert (await stack.http.post("/v1/completions", json=body)).json()["usage"]["completion_tokens"] == 16
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    await stack.http.post("/v1/chat/completions", json=chat)
    start = stack.workers[0].starts[-1]
    assert start.stopping.max_tokens == CONTEXT - len(start.prompt_ids) // 4


async def test_knobs_reach_the_worker_and_the_queue(stack: Stack) -> None:
    response = await stack.complete(
        [5, 6, 7, 8, 9],
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        seed=-7,
        presence_penalty=1,
        repetition_penalty=1.5,
        logit_bias={"7": -100, "8": 2.5},
        min_tokens=2,
        ignore_eos=False,
        stop_token_ids=[17],
        cache_salt="mine",
        priority="high",
        user="somebody",
        something_new=1,
    )
    assert response.status_code == 200
    start, job = stack.workers[0].starts[0], stack.scheduler.jobs[0]
    assert unpack(start.prompt_ids) == [5, 6, 7, 8, 9]
    assert (start.sampling.temperature, start.sampling.top_k, start.sampling.seed) == (0.5, 0, 2**64 - 7)
    assert start.sampling.HasField("presence_penalty") and not start.sampling.HasField("frequency_penalty")
    assert dict(start.sampling.logit_bias) == {7: -100.0, 8: 2.5}
    assert (start.stopping.min_tokens, list(start.stopping.stop_token_ids)) == (2, [17])
    assert start.cache_salt == "mine" and job.priority == 1
    assert job.prompt_tokens == 5 and len(job.block_hashes) == 16 * (5 // BLOCK_SIZE)


async def test_a_deterministic_request_says_so_in_its_job(stack: Stack) -> None:
    await stack.complete(deterministic=True)
    await stack.complete(deterministic=False)
    assert [job.deterministic for job in stack.scheduler.jobs] == [True, False]


async def test_a_seed_is_drawn_when_none_is_given(stack: Stack) -> None:
    await stack.complete()
    assert stack.workers[0].starts[0].sampling.HasField("seed")


@pytest.mark.parametrize("tokens_per_step", [1, 3])
@pytest.mark.parametrize("stop", ["brown fox", ["lazy", "quick br", "zzz"], "🦊 j"])
async def test_stop_strings_end_the_text_and_the_sequence(
    redis_url: str, stop: str | list[str], tokens_per_step: int
) -> None:
    worker = FakeWorker("w0", says(TEXT), tokens_per_step=tokens_per_step)
    async with running_stack(redis_url, [worker]) as stack:
        body = (await stack.complete(stop=stop)).json()
        end = min(TEXT.index(one) for one in ([stop] if isinstance(stop, str) else stop) if one in TEXT)
        assert body["choices"][0]["text"] == TEXT[:end]
        assert body["choices"][0]["finish_reason"] == "stop"
        matched = next(one for one in ([stop] if isinstance(stop, str) else stop) if TEXT[end:].startswith(one))
        tokenizer, ids = byte_level_tokenizer(), byte_level_tokenizer().encode(TEXT).ids
        needed = next(n for n in range(len(ids) + 1) if matched in tokenizer.decode(ids[:n]))
        assert body["usage"]["completion_tokens"] == needed
        streamed = events(await stack.complete(stop=stop, stream=True))
        assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == TEXT[:end]  # type: ignore[index]


async def test_choices_share_the_prompt_and_end_each_on_their_own(redis_url: str) -> None:
    answers = [byte_level_tokenizer().encode(text).ids for text in ("one", "the second one", "third")]
    async with running_stack(redis_url, [FakeWorker("w0", lambda _prompt, choice: answers[choice])]) as stack:
        body = (await stack.complete(n=3)).json()
        assert [choice["text"] for choice in body["choices"]] == ["one", "the second one", "third"]
        assert body["usage"]["completion_tokens"] == sum(len(answer) + 1 for answer in answers)
        chunks = events(await stack.complete(n=3, stream=True))
        finished = {c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]}  # type: ignore[index]
        assert finished == {0, 1, 2}
        assert len(stack.workers[0].starts) == 2


async def test_echo_puts_the_prompt_before_every_choice(stack: Stack) -> None:
    body = (await stack.complete("The fox: ", echo=True, n=2, stop=["quick", "fox"])).json()
    assert [choice["text"] for choice in body["choices"]] == ["The fox: " + TEXT[: TEXT.index("quick")]] * 2
    chunks = events(await stack.complete(["one ", "two "], echo=True, stream=True))
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]  # type: ignore[index]
    assert texts == ["one " + TEXT, "two " + TEXT]
    ids = byte_level_tokenizer().encode("<|im_start|>hi").ids
    assert (await stack.complete(ids, echo=True)).json()["choices"][0]["text"] == "<|im_start|>hi" + TEXT


async def test_every_prompt_is_a_request_of_its_own(redis_url: str) -> None:
    async with running_stack(redis_url, [FakeWorker("w0", lambda prompt, _choice: prompt)]) as stack:
        body = (await stack.complete(["hello", "world"], n=2)).json()
        assert [(c["index"], c["text"]) for c in body["choices"]] == [
            (0, "hello"),
            (1, "hello"),
            (2, "world"),
            (3, "world"),
        ]
        assert len(stack.scheduler.jobs) == 2
        chunks = events(await stack.complete([[40, 41], [42]], stream=True, stream_options={"include_usage": True}))
        texts = {0: "", 1: ""}
        for chunk in chunks[:-1]:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]  # type: ignore[index]
        assert texts == {0: byte_level_tokenizer().decode([40, 41]), 1: byte_level_tokenizer().decode([42])}
        assert chunks[-1]["usage"]["prompt_tokens"] == 3  # type: ignore[index,call-overload]
        await stack.settled()


async def test_nothing_precedes_the_first_token_and_comments_fill_pauses(redis_url: str) -> None:
    async with running_stack(redis_url, sse_comment_every_s=0.05) as stack:
        worker = stack.workers[0]
        worker.go.clear()
        worker.pause_after = 1
        body = {"model": MODEL, "prompt": "hi", "max_tokens": 2, "stream": True}
        request = stack.http.build_request("POST", "/v1/completions", json=body)
        sending = asyncio.create_task(stack.http.send(request, stream=True))
        await worker.started.wait()
        await asyncio.sleep(0.2)
        assert not sending.done(), "status and headers go out with the first token"
        worker.go.set()
        response = await sending
        received = b""
        async for part in response.aiter_raw():
            received += part
            if COMMENT in received:
                worker.pause_after = None
                worker.go.set()
        assert received.startswith(b"data: {") and received.endswith(b"data: [DONE]\n\n")
        assert received.replace(COMMENT, b"").count(b"data: ") == 3


async def test_request_ids_come_back(stack: Stack) -> None:
    response = await stack.http.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    body = {"model": MODEL, "prompt": "hello"}
    response = await stack.http.post("/v1/completions", json=body, headers={"x-request-id": "mine-2"})
    assert response.headers["x-request-id"] == "mine-2"
    assert response.json()["id"] == "cmpl-mine-2"
    assert re.fullmatch(r"mine-2\.[0-9a-f]{8}", stack.scheduler.jobs[0].request_id)
    assert stack.workers[0].starts[0].request_id == stack.scheduler.jobs[0].request_id
    response = await stack.http.post("/v1/completions", json=body, headers={"x-request-id": "not\tsane {}"})
    assert response.headers["x-request-id"] not in ("", "not\tsane {}")
    assert response.headers["x-request-id"] == stack.scheduler.jobs[1].request_id


async def test_trace_context_is_passed_on(stack: Stack) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = {"model": MODEL, "prompt": "hello"}
    await stack.http.post("/v1/completions", json=body, headers={"traceparent": parent})
    assert stack.scheduler.jobs[0].traceparent == parent
    assert stack.workers[0].starts[0].traceparent == parent


async def test_metrics_count_requests_and_tokens(stack: Stack) -> None:
    await stack.complete()
    await stack.complete("hello", model="nobody")
    text = (await stack.http.get("/metrics")).text
    assert f'llm_requests_total{{model="{MODEL}",status="success"}} 1.0' in text
    assert f'llm_tokens_generated_total{{model="{MODEL}"}} {TOKENS + 1}.0' in text
    assert f'llm_active_requests{{model="{MODEL}"}} 0.0' in text
    assert 'headrace_http_requests_total{route="/v1/completions",status="404"} 1.0' in text
    assert "nobody" not in text


async def test_a_gateway_whose_metrics_are_off_works_and_has_none(redis_url: str) -> None:
    async with running_stack(redis_url, metrics=False) as stack:
        assert (await stack.complete()).json()["choices"][0]["text"] == TEXT
        told = await stack.http.get("/metrics")
        assert (told.status_code, "HEADRACE_METRICS" in told.text) == (404, True)
        stats = (await stack.http.get("/v1/stats")).json()
        assert stats["windows"][0]["requests"] == 1


async def test_health(stack: Stack) -> None:
    assert (await stack.http.get("/health/live")).status_code == 200
    assert (await stack.http.get("/health/ready")).json() == {"status": "ready"}


async def test_prompts_that_come_together_are_let_in_together(stack: Stack) -> None:
    stack.scheduler.go.clear()
    asking = asyncio.create_task(stack.complete([[5, 6]] * 100, max_tokens=2))
    await stack.scheduler.popped.wait()
    refused = await stack.complete("alone", priority="low")
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert error["reason"] == "overloaded" and error["retry_after_seconds"] == int(refused.headers["retry-after"])
    stack.scheduler.go.set()
    assert len((await asking).json()["choices"]) == 100
