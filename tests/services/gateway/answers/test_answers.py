"""Recorded answers: callers that leave and come back, gateways that die, and idempotency keys."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from redis.exceptions import ResponseError

from headrace.v1.inference_pb2 import CancelRequest, GenerateDelta, GenerateRequest, ResumeRequest
from headrace.v1.job_pb2 import Job
from headrace.v1.sampling_pb2 import Stopping
from services.common.errors import Overloaded
from services.common.redis.answers import AnswerStore
from services.common.redis.keys import answer_request
from services.gateway.answers.journal import Journal
from services.gateway.keys.limits import KeyLimits
from services.gateway.request import GenerationRequest
from tests.redis_server import RedisServer
from tests.services.gateway.fakes import MODEL, FakeWorker, says
from tests.services.gateway.keys_for_tests import make_key
from tests.services.gateway.stack import TEXT, Stack, eventually, running_gateway, running_stack
from tests.services.gateway.tokenizers_for_tests import byte_level_tokenizer

PATH = "/v1/completions"


def body(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": "hello", "max_tokens": 100, "stream": True, "resumable": True, **fields}


class Reader:
    """Reads a stream of server-sent events."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()
        self.text = ""
        self.event_id = ""
        self.events: list[str] = []

    async def next_event(self) -> bool:
        """False at the end."""
        async for line in self._lines:
            if line.startswith("id: "):
                self.event_id = line.removeprefix("id: ")
            elif line.startswith("data: "):
                self.events.append(line.removeprefix("data: "))
                return self._take(self.events[-1])
        return False

    async def rest(self) -> None:
        while await self.next_event():
            pass

    def _take(self, data: str) -> bool:
        if data == "[DONE]":
            return False
        event = json.loads(data)
        assert "error" not in event, event
        self.text += "".join(choice["text"] for choice in event["choices"])
        return True


@pytest.fixture
async def other(stack: Stack, redis_url: str) -> AsyncIterator[Stack]:
    """Another gateway of the same scheduler."""
    async with running_gateway(redis_url, stack.scheduler, stack.workers, id="other") as running:
        yield running


async def begin(stack: Stack, **fields: object) -> Reader:
    """Reads the first event of a new answer, and leaves. Its worker stands still."""
    stack.workers[0].pause_after = 6
    async with stack.http.stream("POST", PATH, json=body(**fields)) as response:
        assert response.status_code == 200
        reader = Reader(response)
        assert await reader.next_event()
    return reader


async def come_back(stack: Stack, reader: Reader, **fields: object) -> Reader:
    """The rest of an answer."""
    headers = {"last-event-id": reader.event_id}
    async with stack.http.stream("POST", PATH, json=body(**fields), headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        rest = Reader(response)
        await rest.rest()
    return rest


async def test_a_caller_that_comes_back_gets_the_rest(stack: Stack) -> None:
    first = await begin(stack)
    stack.workers[0].let_go()
    rest = await come_back(stack, first)
    assert first.text and rest.text
    assert first.text + rest.text == TEXT
    assert len(stack.workers[0].starts) == 1
    await stack.settled()
    assert stack.sample("headrace_answers_resumed_total") == 1


async def test_an_answer_goes_on_while_nobody_listens(stack: Stack) -> None:
    first = await begin(stack)
    stack.workers[0].let_go()
    await stack.settled()
    again = await come_back(stack, first)
    assert first.text + again.text == TEXT
    assert json.loads(again.events[-2])["choices"][0]["finish_reason"] == "stop"


async def test_another_gateway_echoes_the_prompt(stack: Stack, other: Stack) -> None:
    first = await begin(stack, echo=True)
    stack.workers[0].let_go()
    rest = await come_back(other, first, echo=True)
    assert first.text + rest.text == "hello" + TEXT
    answer_id = first.event_id.rpartition(":")[0]
    whole = (await other.http.get(f"/v1/answers/{answer_id}")).json()
    assert whole["choices"][0]["text"] == "hello" + TEXT


async def test_another_gateway_tells_the_rest(stack: Stack, other: Stack) -> None:
    first = await begin(stack, stop=["lazy dog"])
    coming = asyncio.create_task(come_back(other, first, stop=["lazy dog"]))
    stack.workers[0].let_go()
    rest = await coming
    assert first.text + rest.text == TEXT[: TEXT.index("lazy dog")]


async def test_usage_is_told_to_who_has_read_everything_else(stack: Stack, other: Stack) -> None:
    options = {"stream_options": {"include_usage": True}}
    stack.workers[0].let_go()
    async with stack.http.stream("POST", PATH, json=body(**options)) as response:
        whole = Reader(response)
        await whole.rest()
    await stack.settled()
    for gateway in (stack, other):
        rest = await come_back(gateway, whole, **options)
        assert rest.text == ""
        assert rest.events == whole.events[-2:]


async def test_choices_are_told_apart(stack: Stack, other: Stack) -> None:
    async def texts(gateway: Stack, headers: dict[str, str], leave_after: int) -> tuple[list[str], str]:
        told = ["", ""]
        async with gateway.http.stream("POST", PATH, json=body(n=2), headers=headers) as response:
            reader = Reader(response)
            while (leave_after := leave_after - 1) >= 0 and await reader.next_event():
                for choice in json.loads(reader.events[-1])["choices"]:
                    told[choice["index"]] += choice["text"]
        return told, reader.event_id

    stack.workers[0].pause_after = 6
    first, event_id = await texts(stack, {}, 2)
    stack.workers[0].let_go()
    rest, _ = await texts(other, {"last-event-id": event_id}, 1000)
    assert [first[index] + rest[index] for index in (0, 1)] == [TEXT, TEXT]


async def test_a_dead_gateways_answer_goes_on_on_another(stack: Stack, other: Stack) -> None:
    worker, scheduler = stack.workers[0], stack.scheduler
    worker.pause_after = 6
    async with stack.http.stream("POST", PATH, json=body()) as response:
        reader = Reader(response)
        await reader.next_event()
        await scheduler.orphan(scheduler.jobs[0], scheduler.entry_ids[0])
        await eventually(lambda: _is(len(scheduler.requests) == 1))
        worker.let_go()
        await reader.rest()  # its own gateway lives after all, and tells what the other one records
    assert reader.text == TEXT
    begun, resumed = worker.starts
    assert (resumed.request_id, resumed.attempt) == (begun.request_id, 2)
    assert resumed.sampling.seed == begun.sampling.seed
    assert resumed.choices[0].delivered_ids
    assert other.sample("headrace_adoptions_total") == 1
    await stack.settled()
    assert stack.sample("llm_requests_total", model=MODEL, status="handed_over") == 1
    assert stack.sample("llm_requests_total", model=MODEL, status="error") == 0
    between_tokens_s = other.sample("headrace_inter_token_latency_seconds_sum", model=MODEL)
    assert between_tokens_s < 60, "no gap begins with a token that came to another process"


async def test_what_is_offered_twice_is_adopted_once(stack: Stack, other: Stack) -> None:
    first = await begin(stack)
    job, entry_id = stack.scheduler.jobs[0], stack.scheduler.entry_ids[0]
    await stack.scheduler.orphan(job, entry_id)
    for _ in range(2):  # before it runs here, and before that offer comes
        other.gateway._answers.offered(job, entry_id)
    await eventually(lambda: _is(len(stack.scheduler.requests) == 1))
    stack.workers[0].let_go()
    rest = await come_back(other, first)
    assert first.text + rest.text == TEXT
    await stack.settled()
    assert other.sample("headrace_adoptions_total") == 1
    assert len(stack.workers[0].starts) == 2
    assert not other.gateway._answers._adopting


async def test_what_has_to_be_alone_stays_so_when_it_is_adopted(stack: Stack, other: Stack) -> None:
    worker, scheduler = stack.workers[0], stack.scheduler
    worker.pause_after = 6
    async with stack.http.stream("POST", PATH, json=body()) as response:
        reader = Reader(response)
        await reader.next_event()
        requeued = Job()
        requeued.CopyFrom(scheduler.jobs[0])
        requeued.alone = True
        await scheduler.orphan(requeued, scheduler.entry_ids[0])
        await eventually(lambda: _is(len(scheduler.requests) == 1))
        worker.let_go()
        await reader.rest()
    assert reader.text == TEXT
    assert [start.alone for start in worker.starts] == [False, True]
    assert scheduler.requests[0].job.alone


async def test_an_answer_that_ended_is_not_adopted(stack: Stack, other: Stack) -> None:
    async with stack.http.stream("POST", PATH, json=body()) as response:
        await Reader(response).rest()
    await stack.settled()
    job = stack.scheduler.jobs[0]
    entry_id = await stack.scheduler.queue.enqueue(job)  # its gateway died before it acknowledged
    await eventually(lambda: _is(len(stack.scheduler.jobs) == 2))
    await stack.scheduler.orphan(job, entry_id)
    await stack.settled()
    assert len(stack.workers[0].starts) == 1


async def test_a_gateway_that_shuts_down_leaves_its_answers_to_another(stack: Stack, other: Stack) -> None:
    first = await begin(stack)
    stack.stop.set()
    await stack.task
    await other.scheduler.orphan(other.scheduler.jobs[0], other.scheduler.entry_ids[0])
    other.workers[0].let_go()
    rest = await come_back(other, first)
    assert first.text + rest.text == TEXT


async def test_redis_away_does_not_stop_an_answer(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    try:
        async with running_stack(server.url) as stack:
            stack.workers[0].pause_after = 6
            async with stack.http.stream("POST", PATH, json=body()) as response:
                reader = Reader(response)
                await reader.next_event()
                server.kill()
                stack.workers[0].let_go()
                await reader.rest()
            assert reader.text == TEXT
            server.start()
            await stack.settled()
            answer_id = reader.event_id.rpartition(":")[0]
            await eventually(lambda: _is_kept(stack, answer_id))  # Redis may have forgotten it when it was killed
            reader.event_id = f"{answer_id}:0"
            again = await come_back(stack, reader)
            assert again.text and TEXT.endswith(again.text)
    finally:
        server.kill()


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_cancelling_ends_it_on_whichever_gateway(stack: Stack, other: Stack, elsewhere: bool) -> None:
    gateway = other if elsewhere else stack
    first = await begin(stack)
    answer_id = first.event_id.rpartition(":")[0]
    assert (await gateway.http.post(f"/v1/answers/{answer_id}/cancel")).status_code == 200
    await stack.settled()
    stack.workers[0].let_go()
    await stack.workers[0].cancelled.wait()
    headers = {"last-event-id": first.event_id}
    async with gateway.http.stream("POST", PATH, json=body(), headers=headers) as response:
        assert "The request was cancelled." in (await response.aread()).decode()


async def test_an_answer_is_read_whole(stack: Stack, other: Stack) -> None:
    first = await begin(stack, n=2)
    reading = asyncio.create_task(other.http.get(f"/v1/answers/{first.event_id.rpartition(':')[0]}"))
    stack.workers[0].let_go()
    answer = (await reading).json()
    assert [choice["text"] for choice in answer["choices"]] == [TEXT, TEXT]
    assert answer["id"] == json.loads(first.events[0])["id"]
    assert (await other.http.get("/v1/answers/nobody")).status_code == 404


async def test_who_reads_from_redis_is_bounded(stack: Stack, redis_url: str) -> None:
    async with running_gateway(redis_url, stack.scheduler, stack.workers, id="small", max_readers=1) as small:
        answer_id = (await begin(stack)).event_id.rpartition(":")[0]
        deltas = aiter(small.inference.Resume(ResumeRequest(answer_id=answer_id)))
        text = (await anext(deltas)).text  # type: ignore[arg-type]
        refused = await small.http.get(f"/v1/answers/{answer_id}")
        assert (refused.status_code, "reads 1 answers of others" in refused.text) == (429, True)
        stack.workers[0].let_go()
        async for delta in deltas:
            text += delta.text
        assert text == TEXT
        assert (await small.http.get(f"/v1/answers/{answer_id}")).status_code == 200


async def test_who_leaves_reads_no_more(stack: Stack, redis_url: str) -> None:
    async with running_gateway(redis_url, stack.scheduler, stack.workers, id="small", max_readers=1) as small:
        path = f"/v1/answers/{(await begin(stack)).event_id.rpartition(':')[0]}"
        leaving = asyncio.create_task(small.http.get(path))
        await eventually(lambda: _is(small.gateway._answers._readers == 1))
        leaving.cancel()
        await eventually(lambda: _is(small.gateway._answers._readers == 0))
        labels = {"route": "/v1/answers/{answer_id:path}", "status": "499"}
        await eventually(lambda: _is(small.sample("headrace_http_requests_total", **labels) == 1))
        stack.workers[0].let_go()
        assert (await small.http.get(path)).json()["choices"][0]["text"] == TEXT


async def test_an_answer_outlives_the_workers_of_its_model(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_stack(redis_url, model_memory_s=0) as stack:
        stack.workers[0].let_go()
        async with stack.http.stream("POST", PATH, json=body()) as response:
            reader = Reader(response)
            await reader.rest()
        await stack.settled()
        stack.scheduler.workers = []
        stack.scheduler.announce()

        async def forgotten() -> bool:
            return not (await stack.http.get("/v1/models")).json()["data"]

        await eventually(forgotten)
        path = f"/v1/answers/{reader.event_id.rpartition(':')[0]}"
        assert (await stack.http.get(path)).json()["choices"][0]["text"] == TEXT
        monkeypatch.setattr(stack.gateway._catalog, "recall", lambda name: None)  # as on one that has started since
        unreadable = await stack.http.get(path)
        assert (unreadable.status_code, "has not met a worker of model" in unreadable.text) == (503, True)


async def test_nothing_is_told_of_what_is_not_kept(stack: Stack) -> None:
    for event_id, status, needle in (
        ("nobody:3", 404, "Nothing is kept of an answer nobody."),
        ("nobody", 400, "must be the id of an event"),
        (":1", 400, "must be the id of an event"),
        ("nobody:-1", 400, "must be the id of an event"),
    ):
        response = await stack.http.post(PATH, json=body(), headers={"last-event-id": event_id})
        assert (response.status_code, needle in response.text) == (status, True), response.text
    response = await stack.http.post("/v1/answers/nobody/cancel")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "answer_not_found")


@pytest.mark.parametrize(
    ("fields", "needle"),
    [
        ({"stream": False}, "resumable needs stream"),
        ({"prompt": ["a", "b"]}, "takes one prompt"),
        ({"n": 2, "max_tokens": 60}, "may come to 120"),
    ],
)
async def test_what_cannot_be_recorded_is_refused(redis_url: str, fields: dict[str, object], needle: str) -> None:
    async with running_stack(redis_url, max_recorded_tokens=100) as stack:
        response = await stack.http.post(PATH, json=body(**fields))
        assert response.status_code == 400
        assert needle in response.text


async def test_a_refused_request_leaves_nothing(redis_url: str) -> None:
    async with running_stack(redis_url, max_requests=1) as stack:
        stack.workers[0].go.clear()
        waiting = asyncio.create_task(stack.complete())
        await stack.workers[0].started.wait()
        refused = await stack.http.post(PATH, json=body(), headers={"idempotency-key": "k"})
        assert refused.status_code == 429
        stack.workers[0].let_go()
        await waiting
        assert (await stack.http.post(PATH, json=body(), headers={"idempotency-key": "k"})).status_code == 200


# --- idempotency keys


async def test_a_repeated_request_gets_the_same_answer(redis_url: str) -> None:
    def reply(prompt: list[int], choice: int) -> list[int]:
        return says(TEXT if not worker.starts[1:] else "another")(prompt, choice)

    worker = FakeWorker("w0", reply)
    async with running_stack(redis_url, [worker]) as stack:
        headers = {"idempotency-key": "order-1"}
        request = {"model": MODEL, "prompt": "hello", "max_tokens": 100}
        first = await stack.http.post(PATH, json=request, headers=headers)
        again = await stack.http.post(PATH, json=request, headers=headers)
        assert first.json() == again.json()
        assert len(worker.starts) == 1
        assert stack.sample("headrace_answers_attached_total") == 1
        changed = await stack.http.post(PATH, json={**request, "prompt": "goodbye"}, headers=headers)
        assert (changed.status_code, changed.json()["error"]["code"]) == (422, "idempotency_key_reused")
        other_key = await stack.http.post(PATH, json=request, headers={"idempotency-key": "order-2"})
        assert other_key.json()["choices"][0]["text"] == "another"


async def test_who_repeats_a_running_request_attaches_to_it(stack: Stack, other: Stack) -> None:
    stack.workers[0].pause_after = 6
    headers = {"idempotency-key": "k"}
    request = {"model": MODEL, "prompt": "hello", "max_tokens": 100}
    posts = [asyncio.create_task(stack.http.post(PATH, json=request, headers=headers))]
    await stack.workers[0].started.wait()
    posts += [asyncio.create_task(gateway.http.post(PATH, json=request, headers=headers)) for gateway in (stack, other)]
    posts[0].cancel()  # the first one is gone; the request is not
    stack.workers[0].let_go()
    answers = [await post for post in posts[1:]]
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [TEXT, TEXT]
    assert len(stack.workers[0].starts) == 1


async def test_a_failed_request_may_be_tried_again_under_its_key(redis_url: str) -> None:
    headers = {"idempotency-key": "k", "x-request-timeout-ms": "100"}
    request = {"model": MODEL, "prompt": "hello", "max_tokens": 100}
    async with running_stack(redis_url) as stack:
        stack.scheduler.go.clear()
        failed = await stack.http.post(PATH, json=request, headers=headers)
        assert failed.status_code == 503
        stack.scheduler.go.set()
        del headers["x-request-timeout-ms"]
        answer = await stack.http.post(PATH, json=request, headers=headers)
        assert answer.json()["choices"][0]["text"] == TEXT


@pytest.mark.parametrize(("owner", "method"), [(KeyLimits, "reserve_and_enqueue"), (AnswerStore, "append")])
async def test_one_that_failed_for_whatever_reason_may_be_tried_again_too(
    stack: Stack, other: Stack, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    works = getattr(owner, method)

    async def fails_once(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, method, works)
        raise ResponseError("NOPERM this user has no permissions to run the 'evalsha' command")

    headers = {"idempotency-key": "k"}
    request = {"model": MODEL, "prompt": "hello", "max_tokens": 100}
    monkeypatch.setattr(owner, method, fails_once)
    assert (await stack.http.post(PATH, json=request, headers=headers)).status_code == 500
    async with asyncio.timeout(5):
        answer = await other.http.post(PATH, json=request, headers=headers)
    assert answer.json()["choices"][0]["text"] == TEXT


async def test_who_attaches_to_what_is_refused_hears_so(
    stack: Stack, other: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: GenerationRequest) -> None:
        raise Overloaded("There are too many.")

    go_on, discard = asyncio.Event(), Journal.discard

    async def discard_late(*arguments: Any) -> None:
        await go_on.wait()
        await discard(*arguments)

    monkeypatch.setattr(stack.gateway._admission, "check_load", refuse)
    monkeypatch.setattr(Journal, "discard", discard_late)
    headers = {"idempotency-key": "k"}
    request = {"model": MODEL, "prompt": "hello", "max_tokens": 100}
    first = asyncio.create_task(stack.http.post(PATH, json=request, headers=headers))
    await eventually(lambda: _any_answer(stack))
    twin = asyncio.create_task(other.http.post(PATH, json=request, headers=headers))
    await eventually(lambda: _is(other.sample("headrace_answers_attached_total") == 1))
    go_on.set()
    async with asyncio.timeout(5):
        answers = [await first, await twin]
    assert [(answer.status_code, "too many" in answer.text) for answer in answers] == [(429, True)] * 2


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_keys_have_a_length(stack: Stack, key: str) -> None:
    response = await stack.http.post(PATH, json=body(), headers={"idempotency-key": key})
    assert response.status_code == 400
    assert "idempotency key has 1 to 255 characters" in response.text


# --- with API keys


async def test_an_adopted_answer_is_charged_once_and_whole(stack: Stack, other: Stack) -> None:
    key = await make_key(stack.redis, tokens_per_minute=500, concurrent=1)
    worker, scheduler = stack.workers[0], stack.scheduler
    worker.pause_after = 6
    async with stack.http.stream("POST", PATH, json=body(prompt=[5, 6, 7]), headers=key.headers) as response:
        reader = Reader(response)
        await reader.next_event()
        await scheduler.orphan(scheduler.jobs[0], scheduler.entry_ids[0])
        await eventually(lambda: _is(len(scheduler.requests) == 1))
        worker.let_go()
        await reader.rest()
    assert reader.text == TEXT
    answer = len(byte_level_tokenizer().encode(TEXT).ids) + 1
    assert await key.settled() == {"tokens_per_minute": (3 + answer, 0), "concurrent": (0, 0)}


async def test_answers_are_their_keys_own(stack: Stack) -> None:
    mine, yours = await make_key(stack.redis, tokens_per_minute=1000), await make_key(stack.redis)
    request = {"model": MODEL, "prompt": "hello", "max_tokens": 100}
    named = {"idempotency-key": "k"}
    first = await stack.http.post(PATH, json=request, headers={**mine.headers, **named})
    used = await mine.settled()
    again = await stack.http.post(PATH, json=request, headers={**mine.headers, **named})
    assert again.json() == first.json()
    assert await mine.settled() == used, "what is computed once is charged once"
    your_first = await stack.http.post(PATH, json=request, headers={**yours.headers, **named})
    assert your_first.json()["id"] != first.json()["id"]
    stack.workers[0].pause_after = 6
    async with stack.http.stream("POST", PATH, json=body(), headers=mine.headers) as response:
        reader = Reader(response)
        await reader.next_event()
    answer_id = reader.event_id.rpartition(":")[0]
    for method, path in (("GET", f"/v1/answers/{answer_id}"), ("POST", f"/v1/answers/{answer_id}/cancel")):
        assert (await stack.http.request(method, path, headers=yours.headers)).status_code == 404
    stack.workers[0].let_go()
    whole = await stack.http.get(f"/v1/answers/{answer_id}", headers=mine.headers)
    assert whole.json()["choices"][0]["text"] == TEXT


# --- the same over gRPC


async def test_a_call_is_resumed_over_grpc(stack: Stack, other: Stack) -> None:
    stack.workers[0].pause_after = 6
    request = GenerateRequest(model=MODEL, text="hello", stopping=Stopping(max_tokens=100), resumable=True)
    call = stack.inference.Generate(request)
    read: list[GenerateDelta] = []
    async for delta in call:
        read.append(delta)
        break
    call.cancel()
    stack.workers[0].let_go()
    resume = ResumeRequest(answer_id=read[-1].answer_id, next_position=read[-1].position + 1)
    read += [delta async for delta in other.inference.Resume(resume)]
    assert "".join(delta.text for delta in read) == TEXT
    assert [delta.position for delta in read] == list(range(len(read)))
    assert [delta.seq for delta in read] == list(range(len(read)))
    assert read[-1].usage.completion_tokens == sum(len(delta.token_ids) for delta in read)


async def test_cancel_over_grpc(stack: Stack) -> None:
    stack.workers[0].pause_after = 6
    request = GenerateRequest(model=MODEL, text="hello", stopping=Stopping(max_tokens=100), resumable=True)
    deltas = aiter(stack.inference.Generate(request))
    first = await anext(deltas)  # type: ignore[arg-type]
    await stack.inference.Cancel(CancelRequest(answer_id=first.answer_id))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in deltas:
            pass
    assert raised.value.code() == grpc.StatusCode.CANCELLED
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stack.inference.Cancel(CancelRequest(answer_id="nobody"))
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND


async def _is(value: bool) -> bool:
    return value


async def _any_answer(gateway: Stack) -> bool:
    return bool(await gateway.redis.command("KEYS", answer_request("*")))


async def _is_kept(gateway: Stack, answer_id: str) -> bool:
    return (await gateway.http.get(f"/v1/answers/{answer_id}")).status_code == 200
