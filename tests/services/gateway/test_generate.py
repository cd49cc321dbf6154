"""The life of a request when something goes wrong: every accepted request ends exactly once, and its text is whole."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from headrace.v1.scheduler_pb2 import OfferAnswer, PlacementRequest
from headrace.v1.worker_pb2 import SequenceEnded
from services.gateway.tracing import Tracing
from tests.redis_server import RedisServer
from tests.services.gateway.fakes import MODEL, FakeScheduler, FakeWorker, says, unpack
from tests.services.gateway.stack import TEXT, Stack, eventually, running_stack
from tests.services.gateway.tokenizers_for_tests import byte_level_tokenizer

IDS = byte_level_tokenizer().encode(TEXT).ids


@contextlib.asynccontextmanager
async def streaming(stack: Stack, **fields: object) -> AsyncIterator[httpx.Response]:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 100, "stream": True, **fields}
    async with stack.http.stream("POST", "/v1/completions", json=body) as response:
        yield response


def two_workers(**first: object) -> list[FakeWorker]:
    return [FakeWorker("w0", says(TEXT), **first), FakeWorker("w1", says(TEXT))]  # type: ignore[arg-type]


@pytest.mark.parametrize("lost_after", range(1, len(IDS), 7))
async def test_a_lost_worker_is_invisible_but_for_a_pause(redis_url: str, lost_after: int) -> None:
    async with running_stack(redis_url, two_workers(break_after=lost_after)) as stack:
        body = (await stack.complete("hello world")).json()
        assert body["choices"][0]["text"] == TEXT
        assert body["usage"]["completion_tokens"] == len(IDS) + 1
        first, second = (worker.starts[0] for worker in stack.workers)
        assert (first.attempt, second.attempt) == (1, 2)
        assert unpack(second.choices[0].delivered_ids) == IDS[:lost_after]
        assert second.sampling.seed == first.sampling.seed
        assert stack.scheduler.requests[0].reason == PlacementRequest.REASON_WORKER_LOST
        assert stack.scheduler.requests[0].tried_worker_id == "w0"
        assert stack.sample("headrace_resumes_total", model=MODEL, reason="lost") == 1
        await stack.settled()


async def test_a_deterministic_request_goes_on_where_its_tokens_come_out_alike(redis_url: str) -> None:
    async with running_stack(redis_url, two_workers(break_after=2)) as stack:
        await stack.complete(deterministic=True)
        await stack.complete()
        assert [job.kv_format for job in stack.scheduler.jobs] == ["", ""], "anywhere at first"
        (again,) = (request.job for request in stack.scheduler.requests if request.job.deterministic)
        assert again.kv_format == "format of w0"
        assert not any(request.job.kv_format for request in stack.scheduler.requests if not request.job.deterministic)


async def test_stop_strings_match_across_a_lost_worker(redis_url: str) -> None:
    texts = [byte_level_tokenizer().decode(IDS[:count]) for count in range(len(IDS))]
    break_after = next(count for count, text in enumerate(texts) if text.endswith(("bro", "brow", "brown")))
    async with running_stack(redis_url, two_workers(break_after=break_after)) as stack:
        assert (await stack.complete(stop="brown fox")).json()["choices"][0]["text"] == TEXT.split("brown fox")[0]


async def test_a_worker_lost_before_the_first_token(redis_url: str) -> None:
    workers = two_workers()
    workers[0].go.clear()
    async with running_stack(redis_url, workers) as stack:
        completing = asyncio.create_task(stack.complete())
        await workers[0].started.wait()
        await workers[0].stop()
        assert (await completing).json()["choices"][0]["text"] == TEXT
        workers[0].go.set()


async def test_a_busy_worker_is_no_attempt(redis_url: str) -> None:
    async with running_stack(redis_url, two_workers(busy_starts=1)) as stack:
        assert (await stack.complete()).json()["choices"][0]["text"] == TEXT
        assert [worker.starts[0].attempt for worker in stack.workers] == [1, 1]
        assert stack.scheduler.requests[0].reason == PlacementRequest.REASON_BUSY


async def test_a_draining_worker_hands_over(redis_url: str) -> None:
    async with running_stack(redis_url, two_workers(drain_after=5), max_attempts=1) as stack:
        assert (await stack.complete()).json()["choices"][0]["text"] == TEXT
        assert stack.scheduler.requests[0].reason == PlacementRequest.REASON_DRAINING
        assert unpack(stack.workers[1].starts[0].choices[0].delivered_ids) == IDS[:5]


async def test_only_unfinished_choices_go_on(redis_url: str) -> None:
    short, long = byte_level_tokenizer().encode("one").ids, IDS
    workers = two_workers(break_after=len(short) + 3)
    for worker in workers:
        worker.reply = lambda _prompt, choice: long if choice else short
    async with running_stack(redis_url, workers) as stack:
        body = (await stack.complete(n=2)).json()
        assert [choice["text"] for choice in body["choices"]] == ["one", TEXT]
        assert [choice.choice for choice in workers[1].starts[0].choices] == [1]


async def test_a_request_that_kills_workers_fails_after_its_attempts(redis_url: str) -> None:
    workers = [FakeWorker(f"w{index}", says(TEXT), break_after=1) for index in range(5)]
    async with running_stack(redis_url, workers, max_attempts=3) as stack:
        response = await stack.complete()
        assert response.status_code == 500
        assert "failed on 3 workers" in response.json()["error"]["message"]
        assert sum(len(worker.starts) for worker in workers) == 3
        starts = sorted((start for worker in workers for start in worker.starts), key=lambda start: start.attempt)
        assert [start.alone for start in starts] == [False, False, True]
        assert [request.job.alone for request in stack.scheduler.requests] == [False, True]
        await stack.settled()


async def test_an_error_in_the_stream_is_an_event_and_the_end(redis_url: str) -> None:
    async with running_stack(redis_url, [FakeWorker("w0", says(TEXT), break_after=2)], max_attempts=1) as stack:
        async with streaming(stack) as response:
            assert response.status_code == 200
            events = (await response.aread()).decode().strip().split("\n\n")
        assert "error" in json.loads(events[-1].removeprefix("data: "))
        assert stack.sample("llm_requests_total", model=MODEL, status="error") == 1
        await stack.settled()


async def test_a_request_that_the_worker_calls_invalid_is_not_tried_again(redis_url: str) -> None:
    refusal = SequenceEnded(outcome=SequenceEnded.OUTCOME_FAILED, invalid_request=True, error="Too long for me.")
    async with running_stack(redis_url, two_workers(error=refusal)) as stack:
        response = await stack.complete()
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "Too long for me."
        assert not stack.workers[1].starts


async def test_an_engine_error_is_tried_elsewhere(redis_url: str) -> None:
    failure = SequenceEnded(outcome=SequenceEnded.OUTCOME_FAILED, error="out of memory")
    async with running_stack(redis_url, two_workers(error=failure)) as stack:
        assert (await stack.complete()).json()["choices"][0]["text"] == TEXT


async def test_a_refused_placement_ends_the_request(redis_url: str) -> None:
    async with running_stack(redis_url, [FakeWorker("w0", says(TEXT), busy_starts=1)]) as stack:
        stack.scheduler.refuse = "No worker serves it any more."
        response = await stack.complete()
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "No worker serves it any more."


async def test_a_job_that_fits_no_worker_is_the_callers_mistake(redis_url: str) -> None:
    async with running_stack(redis_url, [FakeWorker("w0", says(TEXT), busy_starts=1)]) as stack:
        stack.scheduler.refuse, stack.scheduler.refuse_permanently = "No worker is large enough.", True
        response = await stack.complete()
        assert response.status_code == 400
        assert "retry-after" not in response.headers
        assert response.json()["error"]["message"] == "No worker is large enough."


async def test_nobody_takes_over_within_the_patience(redis_url: str) -> None:
    workers = [FakeWorker("w0", says(TEXT), break_after=3)]
    async with running_stack(redis_url, workers, resume_patience_s=0.05) as stack:
        async with streaming(stack) as response:
            await stack.scheduler.stop()
            events = (await response.aread()).decode().strip().split("\n\n")
        assert "no other took over" in events[-1]


async def test_the_deadline_passes_in_the_queue(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        stack.scheduler.go.clear()
        body = {"model": MODEL, "prompt": "hello"}
        response = await stack.http.post("/v1/completions", json=body, headers={"x-request-timeout-ms": "100"})
        assert response.status_code == 503
        assert "retry-after" in response.headers
        assert "0.1 seconds" in response.json()["error"]["message"]
        await stack.settled()
        stack.scheduler.go.set()
        assert (await stack.complete()).status_code == 200

        async def both_answered() -> bool:  # nobody waits to hear that an offer was accepted
            return len(stack.scheduler.answers) == 2

        await eventually(both_answered)
        gone = [answer.status for answer in stack.scheduler.answers]
        assert gone == [OfferAnswer.STATUS_GONE, OfferAnswer.STATUS_ACCEPTED]


async def test_a_client_that_leaves_while_queued_withdraws_its_entry(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        stack.scheduler.go.clear()
        leaving = asyncio.create_task(stack.complete())
        await stack.scheduler.popped.wait()
        await stack.held("waiting")  # before it knows the entry, the entry's offer would end it
        leaving.cancel()
        await stack.settled()
        stack.scheduler.go.set()
        assert stack.sample("llm_requests_total", model=MODEL, status="cancelled") == 1
        assert not stack.workers[0].starts


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_its_sequence(redis_url: str, stream: bool) -> None:
    async with running_stack(redis_url) as stack:
        worker = stack.workers[0]
        worker.go.clear()
        leaving = asyncio.create_task(stack.complete(stream=stream))
        await worker.started.wait()
        leaving.cancel()
        await worker.cancelled.wait()
        await stack.settled()
        worker.go.set()
        assert stack.sample("llm_active_requests", model=MODEL) == 0


async def test_a_client_that_leaves_in_the_middle_of_its_stream(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        stack.workers[0].reply = lambda _prompt, _choice: IDS * 100
        async with streaming(stack, max_tokens=250) as response:
            await anext(response.aiter_bytes())
        await stack.settled()
        assert stack.sample("llm_active_requests", model=MODEL) == 0
        assert (await stack.complete(max_tokens=5)).status_code == 200


async def test_a_stop_string_cancels_the_sequence(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        stack.workers[0].reply = lambda _prompt, _choice: IDS * 100
        assert (await stack.complete(stop="fox", max_tokens=250)).status_code == 200
        await stack.workers[0].cancelled.wait()


async def test_too_many_requests_are_told_to_come_back(redis_url: str) -> None:
    async with running_stack(redis_url, max_requests=2) as stack:
        stack.scheduler.go.clear()
        waiting = [asyncio.create_task(stack.complete()) for _ in range(2)]

        async def both_wait() -> bool:
            return stack.sample("llm_active_requests", model=MODEL) == 2

        await eventually(both_wait)
        response = await stack.complete()
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
        stack.scheduler.go.set()
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]


async def test_a_second_offer_of_a_running_job_hears_that_it_runs(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        stack.workers[0].go.clear()
        completing = asyncio.create_task(stack.complete())
        await stack.workers[0].started.wait()
        stack.scheduler.offer(stack.scheduler.jobs[0].request_id, 1, "1-1", stack.workers[0])
        stack.scheduler.offer("nobody", 1, "1-1", stack.workers[0])

        async def answered() -> bool:
            return len(stack.scheduler.answers) == 3

        await eventually(answered)
        stack.workers[0].go.set()
        assert (await completing).json()["choices"][0]["text"] == TEXT
        answers = [answer.status for answer in stack.scheduler.answers]
        assert answers == [OfferAnswer.STATUS_ACCEPTED, OfferAnswer.STATUS_RUNNING, OfferAnswer.STATUS_GONE]
        assert len(stack.workers[0].starts) == 1


async def test_requests_with_the_same_id_do_not_meet(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        body = {"model": MODEL, "prompt": "hello", "max_tokens": 100}
        headers = {"x-request-id": "same"}
        posts = [stack.http.post("/v1/completions", json=body, headers=headers) for _ in range(8)]
        for response in await asyncio.gather(*posts):
            assert response.json()["choices"][0]["text"] == TEXT
        assert len({job.request_id for job in stack.scheduler.jobs}) == 8


async def test_many_streams_at_once_keep_apart(redis_url: str) -> None:
    workers = [FakeWorker(f"w{index}", lambda prompt, _choice: prompt) for index in range(2)]
    async with running_stack(redis_url, workers) as stack:
        prompts = [byte_level_tokenizer().encode(f"request number {number} of many").ids for number in range(60)]
        responses = await asyncio.gather(*(stack.complete(prompt) for prompt in prompts))
        for prompt, response in zip(prompts, responses, strict=True):
            assert response.json()["choices"][0]["text"] == byte_level_tokenizer().decode(prompt)
        assert all(len(worker.starts) == 30 for worker in workers)
        await stack.settled()


async def test_a_placement_request_finds_another_scheduler(redis_url: str) -> None:
    workers = two_workers(break_after=4)
    second = FakeScheduler(redis_url, workers)
    async with running_stack(redis_url, workers) as stack:
        stack.workers[0].go.clear()
        completing = asyncio.create_task(stack.complete())
        await stack.workers[0].started.wait()
        port = int(stack.scheduler.address.rpartition(":")[2])
        await stack.scheduler.stop()
        stack.workers[0].go.set()  # breaks while no scheduler is there to be asked
        await second.serve(port)
        assert (await completing).json()["choices"][0]["text"] == TEXT
        assert second.requests[0].attempt == 2
        await second.stop()


async def test_a_model_is_remembered_while_its_worker_restarts(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        workers, stack.scheduler.workers = stack.scheduler.workers, []
        stack.scheduler.announce()
        stack.scheduler.go.clear()
        completing = asyncio.create_task(stack.complete())
        await stack.scheduler.popped.wait()
        stack.scheduler.workers = workers
        stack.scheduler.announce()
        stack.scheduler.go.set()
        assert (await completing).json()["choices"][0]["text"] == TEXT


async def test_running_requests_go_on_while_redis_is_away(redis_server: RedisServer, redis_url: str) -> None:
    async with running_stack(redis_url, two_workers(break_after=5)) as stack:
        stack.workers[0].go.clear()
        completing = asyncio.create_task(stack.complete())
        await stack.workers[0].started.wait()
        redis_server.kill()
        try:
            stack.workers[0].go.set()
            assert (await completing).json()["choices"][0]["text"] == TEXT
            response = await stack.complete()
            assert response.status_code == 503
            assert "Redis" in response.json()["error"]["message"]
        finally:
            redis_server.start()
        await stack.settled()


async def test_an_entry_that_redis_forgot_is_added_again(redis_server: RedisServer, redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        stack.workers[0].go.clear()
        completing = asyncio.create_task(stack.complete())
        await stack.workers[0].started.wait()
        redis_server.flush()

        async def back() -> bool:
            return await stack.entries() == 1

        await eventually(back)
        stack.workers[0].go.set()
        assert (await completing).json()["choices"][0]["text"] == TEXT
        await stack.settled()
        assert len(stack.workers[0].starts) == 1


async def test_a_waiting_entry_that_redis_forgot_is_added_again(redis_server: RedisServer, redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        stack.scheduler.go.clear()
        completing = asyncio.create_task(stack.complete())
        await stack.scheduler.popped.wait()
        await stack.scheduler.stop_popping()
        redis_server.flush()

        async def back() -> bool:
            return await stack.entries() == 1

        await eventually(back)
        stack.scheduler.go.set()
        stack.scheduler.start_popping()
        assert (await completing).json()["choices"][0]["text"] == TEXT
        await stack.settled()
        assert len(stack.workers[0].starts) == 1


async def test_a_later_attempt_runs_though_its_entry_waits_in_the_queue(
    redis_server: RedisServer, redis_url: str
) -> None:
    async with running_stack(redis_url, two_workers(break_after=5), resume_patience_s=5) as stack:
        stack.workers[0].go.clear()
        completing = asyncio.create_task(stack.complete())
        await stack.workers[0].started.wait()
        await stack.scheduler.stop_popping()
        redis_server.flush()

        async def back() -> bool:
            return await stack.entries() == 1

        await eventually(back)
        stack.workers[0].go.set()  # breaks: nobody has popped the entry, so nobody can take it over
        assert (await completing).json()["choices"][0]["text"] == TEXT
        assert stack.workers[1].starts[0].attempt == 2
        await stack.settled()


async def test_a_request_that_cannot_begin_holds_no_slot(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_stack(redis_url, max_requests=1) as stack:
        with monkeypatch.context() as patch:
            patch.setattr(Tracing, "begin", lambda *_: 1 / 0)
            assert (await stack.complete()).status_code == 500
        assert (await stack.complete()).status_code == 200


async def test_a_hidden_stop_token_is_counted_and_not_shown(redis_url: str) -> None:
    comma = IDS[3]
    async with running_stack(redis_url) as stack:
        stack.workers[0].reply = lambda _prompt, _choice: IDS[:4]
        body = (await stack.complete(stop_token_ids=[comma], max_tokens=4)).json()
        assert body["choices"][0]["text"] == byte_level_tokenizer().decode(IDS[:3])
        assert body["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("fields", [{}, {"logprobs": 1}, {"stop": "never said"}])
@pytest.mark.parametrize("tokens_per_step", [1, 3])
async def test_a_worker_that_goes_on_beyond_max_tokens_is_cut_off(
    redis_url: str, tokens_per_step: int, fields: dict[str, object]
) -> None:
    worker = FakeWorker("w0", says(TEXT), tokens_per_step=tokens_per_step, beyond=6)
    async with running_stack(redis_url, [worker]) as stack:
        body = (await stack.complete(max_tokens=4, **fields)).json()
        usage = {"include_usage": True}
        async with streaming(stack, max_tokens=4, stream_options=usage, **fields) as response:
            lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line.startswith("data: {")]
        *chunks, last = map(json.loads, lines)
        assert body["choices"][0]["text"] == byte_level_tokenizer().decode(IDS[:4])
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == body["choices"][0]["text"]
        assert body["choices"][0]["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == last["usage"]["completion_tokens"] == 4
        await stack.settled()


async def test_shutting_down_ends_what_does_not_finish(redis_url: str) -> None:
    async with running_stack(redis_url, drain_grace_s=0.1) as stack:
        stack.workers[0].go.clear()
        completing = asyncio.create_task(stack.complete())
        await stack.workers[0].started.wait()
        stack.stop.set()
        response = await completing
        assert response.status_code == 503
        assert "shut down" in response.json()["error"]["message"]
        await stack.task
        assert await stack.entries() == 0
        stack.workers[0].go.set()


async def test_shutting_down_lets_running_requests_finish(redis_url: str) -> None:
    async with running_stack(redis_url, drain_grace_s=10) as stack:
        stack.workers[0].go.clear()
        completing = asyncio.create_task(stack.complete())
        await stack.workers[0].started.wait()
        stack.stop.set()

        async def not_ready() -> bool:
            return (await stack.http.get("/health/ready")).status_code == 503

        await eventually(not_ready)
        assert (await stack.http.get("/health/live")).status_code == 200
        assert (await stack.complete()).status_code == 503
        stack.workers[0].go.set()
        assert (await completing).json()["choices"][0]["text"] == TEXT
        await stack.task
