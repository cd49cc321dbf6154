"""The public gRPC service, by a real client."""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.v1 import inference_pb2
from headrace.v1.inference_pb2 import Chat, ChatMessage, GenerateRequest, ResumeRequest, TokenIds, TokenizeRequest
from headrace.v1.inference_pb2_grpc import InferenceStub
from headrace.v1.sampling_pb2 import FinishReason, Logprobs, Sampling, Stopping
from services.common.channel import dial
from tests.services.gateway.fakes import BLOCK_SIZE, CONTEXT, MODEL, FakeWorker, logprobs_of, unpack
from tests.services.gateway.looks import WRITE_TIMEOUT_S, Looks
from tests.services.gateway.stack import TEXT, Stack, eventually, running_stack
from tests.services.gateway.tokenizers_for_tests import byte_level_tokenizer

IDS = byte_level_tokenizer().encode(TEXT).ids
LONG = GenerateRequest(model=MODEL, text="hello", sampling=Sampling(logprobs=20))
VOCABULARY = byte_level_tokenizer().get_vocab_size()

BAD: list[tuple[GenerateRequest, grpc.StatusCode, str]] = [
    (GenerateRequest(model=MODEL), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    (GenerateRequest(model=MODEL, text=""), grpc.StatusCode.INVALID_ARGUMENT, "text"),
    (GenerateRequest(model=MODEL, token_ids=TokenIds()), grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
    (GenerateRequest(model=MODEL, token_ids=TokenIds(ids=[VOCABULARY])), grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
    (GenerateRequest(model=MODEL, token_ids=TokenIds(ids=[1] * CONTEXT)), grpc.StatusCode.INVALID_ARGUMENT, "context"),
    (GenerateRequest(model=MODEL, chat=Chat()), grpc.StatusCode.INVALID_ARGUMENT, "chat"),
    (
        GenerateRequest(model=MODEL, chat=Chat(messages=[ChatMessage(role="wizard")])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "wizard",
    ),
    (
        GenerateRequest(model=MODEL, text="x", sampling=Sampling(temperature=math.nan)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "temperature",
    ),
    (
        GenerateRequest(model=MODEL, text="x", sampling=Sampling(top_p=math.inf)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "top_p",
    ),
    (
        GenerateRequest(model=MODEL, text="x", sampling=Sampling(logit_bias={5: math.nan})),
        grpc.StatusCode.INVALID_ARGUMENT,
        "logit_bias",
    ),
    (
        GenerateRequest(model=MODEL, text="x", sampling=Sampling(logprobs=21)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "logprobs",
    ),
    (GenerateRequest(model=MODEL, text="x", n=0), grpc.StatusCode.INVALID_ARGUMENT, "n must"),
    (
        GenerateRequest(model=MODEL, text="x", stopping=Stopping(max_tokens=0)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "max_tokens",
    ),
    (
        GenerateRequest(model=MODEL, text="x", stopping=Stopping(max_tokens=-1)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "max_tokens",
    ),
    (
        GenerateRequest(model=MODEL, text="x", stopping=Stopping(max_tokens=10**9)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "max_tokens",
    ),
    (GenerateRequest(model=MODEL, text="x", priority=9), grpc.StatusCode.INVALID_ARGUMENT, "priority"),  # type: ignore[arg-type]
    (GenerateRequest(model="gpt-9", text="x"), grpc.StatusCode.NOT_FOUND, "gpt-9"),
]


async def test_deltas_make_up_the_text(stack: Stack) -> None:
    call = stack.inference.Generate(
        GenerateRequest(model=MODEL, text="hello world"), metadata=(("x-request-id", "r1"),)
    )
    deltas = [delta async for delta in call]
    initial: Any = await call.initial_metadata()
    assert ("x-request-id", "r1") in list(initial)
    text = ""
    for seq, delta in enumerate(deltas):
        assert (delta.request_id, delta.seq, delta.text_offset) == ("r1", seq, len(text))
        text += delta.text
    assert text == TEXT
    eos = byte_level_tokenizer().token_to_id("<|im_end|>")
    assert [token_id for delta in deltas for token_id in delta.token_ids] == [*IDS, eos]
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [FinishReason.FINISH_REASON_STOP]
    assert deltas[-1].usage.completion_tokens == len(IDS) + 1
    assert not any(delta.HasField("usage") for delta in deltas[:-1])


async def test_a_deltas_logprobs_are_those_of_its_tokens(stack: Stack) -> None:
    request = GenerateRequest(model=MODEL, text="hello", sampling=Sampling(logprobs=2), stopping=Stopping(stop=["fox"]))
    deltas = [delta async for delta in stack.inference.Generate(request)]
    tokens, values = [], Logprobs()
    for delta in deltas:
        assert len(delta.logprobs.token_logprobs) == len(delta.token_ids)
        tokens += delta.token_ids
        values.MergeFrom(delta.logprobs)
    assert tokens == IDS[: len(tokens)]
    assert values == logprobs_of(tokens, 0, 2)
    async for delta in stack.inference.Generate(GenerateRequest(model=MODEL, text="hello")):
        assert not delta.HasField("logprobs")


async def test_a_refused_call_has_no_initial_metadata_so_that_clients_may_try_again(stack: Stack) -> None:
    for call in (
        stack.inference.Generate(GenerateRequest(model="gpt-9", text="x")),
        stack.inference.Resume(ResumeRequest(answer_id="nobody")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in call:
                pass
        assert raised.value.code() == grpc.StatusCode.NOT_FOUND
        assert "x-request-id" not in dict(raised.value.initial_metadata())


async def test_token_ids_and_chats_are_prompts_too(stack: Stack) -> None:
    async for _ in stack.inference.Generate(GenerateRequest(model=MODEL, token_ids=TokenIds(ids=[5, 6, 7, 8]))):
        pass
    assert unpack(stack.workers[0].starts[0].prompt_ids) == [5, 6, 7, 8]
    assert len(stack.scheduler.jobs[0].block_hashes) == 16 * (4 // BLOCK_SIZE)
    chat = Chat(messages=[ChatMessage(role="user", content="hi")])
    async for _ in stack.inference.Generate(GenerateRequest(model=MODEL, chat=chat, n=2)):
        pass
    tokenized = await stack.inference.Tokenize(TokenizeRequest(model=MODEL, chat=chat))
    assert unpack(stack.workers[0].starts[1].prompt_ids) == list(tokenized.token_ids)


async def test_bad_requests(stack: Stack) -> None:
    for request, code, needle in BAD:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in stack.inference.Generate(request):
                pass
        assert raised.value.code() == code, request
        assert needle in (raised.value.details() or ""), (request, raised.value.details())
    assert not stack.scheduler.jobs


async def test_models_and_tokens(stack: Stack) -> None:
    models = (await stack.inference.ListModels(inference_pb2.ListModelsRequest())).models
    assert [(model.name, model.max_context_tokens, model.vocabulary_size) for model in models] == [
        (MODEL, CONTEXT, VOCABULARY)
    ]
    tokens = await stack.inference.Tokenize(TokenizeRequest(model=MODEL, text="hello world"))
    assert list(tokens.token_ids) == byte_level_tokenizer().encode("hello world").ids


async def test_a_cancelled_call_cancels_the_sequence(stack: Stack) -> None:
    worker = stack.workers[0]
    worker.go.clear()
    call = stack.inference.Generate(GenerateRequest(model=MODEL, text="hello"))
    reading = asyncio.create_task(anext(aiter(call)))  # type: ignore[arg-type]
    await worker.started.wait()
    call.cancel()
    await worker.cancelled.wait()
    await stack.settled()
    await asyncio.gather(reading, return_exceptions=True)
    worker.go.set()


async def test_calls_cancelled_between_deltas_free_everything(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    stack.workers[0].reply = lambda _prompt, _choice: IDS * 100
    async with small_window(stack) as inference:
        for _ in range(20):
            call = inference.Generate(LONG)
            await anext(aiter(call))
            await stack.inference.ListModels(inference_pb2.ListModelsRequest())  # then a delta is on its way
            call.cancel()
        await stack.settled()
    assert stack.sample("llm_active_requests", model=MODEL) == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_call_whose_client_does_not_read_is_cancelled(redis_url: str) -> None:
    worker = FakeWorker("w0", lambda _prompt, _choice: IDS * 100, pause_after=20)
    async with running_stack(redis_url, [worker], write_timeout_s=0.1) as stack, small_window(stack) as inference:
        call = inference.Generate(LONG)
        await anext(aiter(call))
        await asyncio.wait_for(worker.cancelled.wait(), 10)
        worker.let_go()
        await stack.settled()
        assert stack.sample("llm_requests_total", model=MODEL, status="cancelled") == 1
        assert stack.sample("llm_active_requests", model=MODEL) == 0
        await check_cut(call)


async def test_a_resumed_call_whose_client_does_not_read_ends(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_stack(redis_url, write_timeout_s=WRITE_TIMEOUT_S) as stack, small_window(stack) as inference:
        request = GenerateRequest(resumable=True)
        request.MergeFrom(LONG)
        [answer_id] = {delta.answer_id async for delta in inference.Generate(request)}
        looks = Looks(monkeypatch)
        call = inference.Resume(ResumeRequest(answer_id=answer_id))
        await anext(aiter(call))
        await eventually(looks.were_enough)
        await check_cut(call)


@contextlib.asynccontextmanager
async def small_window(stack: Stack) -> AsyncIterator[InferenceStub]:
    """A client that has room for next to nothing that it has not read."""
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with grpc.aio.insecure_channel(stack.grpc_address, options=options) as channel:
        yield InferenceStub(channel)


async def check_cut(call: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in call:
            pass
    assert raised.value.code() == grpc.StatusCode.CANCELLED
    assert "The client read nothing" in raised.value.details()


async def test_a_call_that_is_read_slowly_goes_on(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_stack(redis_url, write_timeout_s=WRITE_TIMEOUT_S) as stack, small_window(stack) as inference:
        looks = Looks(monkeypatch)
        text = ""
        async for delta in inference.Generate(LONG):
            text += delta.text
            if delta.seq % 10 == 9 and not looks.none_is_due:  # with more read than it has room for
                (await looks.next())()
        assert text == TEXT


async def test_the_deadline_bounds_the_wait_in_the_queue(stack: Stack) -> None:
    stack.scheduler.go.clear()
    for options in ({"timeout": 0.2}, {"metadata": (("x-request-timeout-ms", "50"),)}):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(aiter(stack.inference.Generate(GenerateRequest(model=MODEL, text="x"), **options)))  # type: ignore[arg-type]
        assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await stack.settled()
    stack.scheduler.go.set()


async def test_health_follows_readiness(stack: Stack) -> None:
    async with dial(stack.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="headrace.v1.Inference")

        async def serving() -> bool:
            return (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING

        await eventually(serving)
