"""A whole worker: what gateways, schedulers and cache services see of it."""

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from headrace.v1 import (
    cache_pb2,
    sampling_pb2,
    scheduler_pb2,
    worker_pb2,
    worker_pb2_grpc,
)
from services.common.block_hash import chain_hashes, chain_root
from services.common.channel import Outbox, dial
from tests.services.worker.stack import BLOCK_SIZE, NUM_BLOCKS, Ended, Gateway, Stack


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    stack = Stack()
    await stack.start()
    yield stack
    await stack.stop()
    await stack.close()


async def test_tokens_arrive_in_order_and_end_once(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    prompts = {1: [3, 4, 5], 2: [6, 7], 3: [8] * 30}
    for handle, prompt in prompts.items():
        gateway.start(f"r{handle}", [handle], prompt, max_tokens=10 + handle)
    await gateway.finish(1, 2, 3)
    for handle, prompt in prompts.items():
        assert gateway.tokens[handle] == stack.expected(prompt, 10 + handle)
        assert gateway.ended[handle].outcome == Ended.OUTCOME_FINISHED
        assert gateway.ended[handle].finish_reason == sampling_pb2.FINISH_REASON_LENGTH
    steps = [output.step for output in gateway.outputs if output.handles]
    assert len(steps) == len(set(steps)), "one message per step"


async def test_three_choices_share_the_prompts_blocks(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    prompt = list(range(1, 14))
    gateway.start("r", [5, 6, 7], prompt)
    await gateway.finish(5, 6, 7)
    assert gateway.tokens == dict.fromkeys([5, 6, 7], stack.expected(prompt))
    assert gateway.cached == {5: 0, 6: 12, 7: 12}


async def test_logprobs_come_beside_the_tokens_of_those_that_ask(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    whole = stack.expected([3, 4, 5])
    gateway.start("asks", [1], [3, 4, 5], logprobs=2)
    gateway.start("asks for its own alone", [2], [3, 4, 5], logprobs=0)
    gateway.start("resumed", [3], [3, 4, 5], attempt=2, delivered=whole[:5], logprobs=2)
    gateway.start("does not ask", [4], [3, 4, 5])
    await gateway.finish(1, 2, 3, 4)
    assert gateway.logprobs.keys() == {1, 2, 3}
    for position, token in enumerate(whole):
        expected = stack.runner.logits_after([3, 4, 5, *whole[:position]]).log_softmax(dim=-1)
        assert gateway.logprobs[1].token_logprobs[position] == pytest.approx(float(expected[token]), abs=1e-6)
        assert gateway.logprobs[1].top_ids[2 * position] == token, "a greedy one is the likeliest"
    assert len(gateway.logprobs[1].top_logprobs) == 2 * len(whole)
    assert gateway.logprobs[2].token_logprobs == gateway.logprobs[1].token_logprobs
    assert not gateway.logprobs[2].top_ids
    assert gateway.logprobs[3].token_logprobs == gateway.logprobs[1].token_logprobs[5:]


async def test_a_resumed_attempt_goes_on_after_what_was_delivered(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    whole = stack.expected([3, 4, 5])
    gateway.start("r", [1], [3, 4, 5], attempt=2, delivered=whole[:5])
    await gateway.finish(1)
    assert gateway.tokens[1] == whole[5:]


async def test_cancel_ends_a_sequence_and_frees_it(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    stack.hold(after=3)
    gateway.start("r", [1], [3, 4, 5], max_tokens=190)
    await gateway.until(lambda: 1 in gateway.tokens)
    gateway.cancel(1, 99)
    await gateway.finish(1)
    stack.release()
    assert gateway.ended[1].finish_reason == sampling_pb2.FINISH_REASON_CANCELLED
    await stack.scheduler.until(lambda state: state.credits.sequences == 4 and state.free_blocks == NUM_BLOCKS)
    await stack.until_metric(1, "headrace_cancel_seconds_count", phase="decode")
    assert stack.metric("headrace_cancel_seconds_sum", phase="decode") > 0
    gateway.cancel(1)
    gateway.start("r2", [2], [3])
    await gateway.finish(2)


@pytest.mark.parametrize("ending", ["cancel", "half-close", "channel"])
async def test_a_broken_stream_frees_its_sequences_and_no_others(stack: Stack, ending: str) -> None:
    own_channel = dial(stack.address)
    leaving, staying = Gateway(own_channel), Gateway(stack.channel)
    leaving.start("r1", [1, 2], [3, 4, 5], max_tokens=190)
    staying.start("r2", [1], [6, 7], max_tokens=30)
    await leaving.until(lambda: {1, 2} <= leaving.tokens.keys())
    if ending == "cancel":
        leaving.call.cancel()
    elif ending == "half-close":
        leaving._commands.close()
    await asyncio.shield(own_channel.close()) if ending == "channel" else None
    await staying.finish(1)
    assert staying.tokens[1] == stack.expected([6, 7], 30)
    await stack.scheduler.until(lambda state: state.free_blocks == NUM_BLOCKS and state.credits.sequences == 4)
    await own_channel.close()


async def test_a_full_worker_answers_busy_for_all_choices_of_a_request(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    stack.hold()
    gateway.start("r1", [1, 2, 3], [3], max_tokens=190)
    gateway.start("r2", [4, 5], [3], max_tokens=5)
    await gateway.finish(4, 5)
    stack.release()
    assert {gateway.ended[handle].outcome for handle in (4, 5)} == {Ended.OUTCOME_BUSY}
    gateway.cancel(1, 2, 3)
    await gateway.finish(1, 2, 3)
    gateway.start("r2", [6, 7], [3], max_tokens=5)
    await gateway.finish(6, 7)
    assert gateway.tokens[6] == gateway.tokens[7] == stack.expected([3], 5)


async def test_no_more_is_taken_on_while_too_many_prompt_tokens_are_pending(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    stack.hold()
    gateway.start("r1", [1], [4] * 150, max_tokens=5)  # more than may be pending, but the worker is idle
    gateway.start("r2", [2], [5], max_tokens=5)
    await gateway.finish(2)
    assert gateway.ended[2].outcome == Ended.OUTCOME_BUSY
    stack.release()
    await gateway.finish(1)
    assert gateway.tokens[1] == stack.expected([4] * 150, 5)


async def test_an_invalid_request_fails_alone_and_names_the_limit(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    gateway.start("r1", [1, 2], [3, 31])
    gateway.start("r2", [3], [3] * 198, max_tokens=3)
    gateway.start("r3", [4], [3])
    await gateway.finish(1, 2, 3, 4)
    for handle in (1, 2, 3):
        assert gateway.ended[handle].outcome == Ended.OUTCOME_FAILED and gateway.ended[handle].invalid_request
    assert "vocabulary has 31" in gateway.ended[1].error
    assert "context of 200" in gateway.ended[3].error
    assert gateway.tokens[4] == stack.expected([3])


@pytest.mark.parametrize("fault", ["no hello", "hello twice", "handle twice", "no choices"])
async def test_commands_that_make_no_sense_end_the_stream(stack: Stack, fault: str) -> None:
    gateway = Gateway(stack.channel)
    hello = worker_pb2.ExecuteCommand(hello=worker_pb2.ExecuteHello(gateway_id="g1"))
    if fault == "no hello":
        commands: Outbox[worker_pb2.ExecuteCommand] = Outbox()
        commands.put(worker_pb2.ExecuteCommand(cancel=worker_pb2.Cancel(handles=[1])))
        gateway.call = worker_pb2_grpc.WorkerStub(stack.channel).Execute(commands)
    elif fault == "hello twice":
        gateway.say(hello)
    elif fault == "handle twice":
        stack.hold()
        gateway.start("r1", [1], [3], max_tokens=190)
        gateway.start("r2", [1], [3])
    else:
        gateway.start("r1", [], [3])
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await gateway.until(lambda: False)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    stack.release()
    await stack.scheduler.until(lambda state: state.free_blocks == NUM_BLOCKS and state.credits.sequences == 4)


async def test_a_failing_step_fails_its_sequences_and_the_worker_goes_on(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    stack.runner.fail_next = MemoryError()
    gateway.start("r1", [1], [3, 4])
    await gateway.finish(1)
    assert gateway.ended[1].outcome == Ended.OUTCOME_FAILED and not gateway.ended[1].invalid_request
    assert "MemoryError" in gateway.ended[1].error
    gateway.start("r2", [2], [3, 4])
    await gateway.finish(2)
    assert gateway.tokens[2] == stack.expected([3, 4])


async def test_an_idle_stream_carries_signs_of_life(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    gateway.start("r1", [1], [3, 4], max_tokens=3)
    await gateway.finish(1)
    assert (await gateway.sign_of_life()).step == 3


async def test_the_scheduler_learns_who_this_is_and_what_is_free(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    idle = await stack.scheduler.until(lambda state: state.credits.sequences == 4)
    assert (idle.credits.blocks, idle.credits.prefill_tokens) == (NUM_BLOCKS, 64)
    [registration] = stack.scheduler.registrations
    assert (registration.worker_id, registration.address) == ("w1", stack.address)
    assert (registration.model.name, registration.model.tokenizer_hash) == ("tiny", "hash")
    assert (registration.max_sequences, registration.total_blocks) == (4, NUM_BLOCKS)
    assert registration.role == scheduler_pb2.WORKER_ROLE_BOTH
    assert not registration.HasField("price_per_hour")
    stack.hold(after=3)
    gateway.start("r1", [1], [3] * 9, max_tokens=150, attempt=2)
    gateway.start("r2", [2], [99], max_tokens=150)
    await gateway.until(lambda: 1 in gateway.tokens)
    busy = await stack.scheduler.until(lambda state: state.running_sequences == 1)
    assert busy.credits.sequences == 3 and busy.credits.blocks <= NUM_BLOCKS - 4
    await gateway.finish(2)
    stack.release()
    await stack.scheduler.until(lambda state: len(stack.scheduler.settled) == 2)
    assert stack.scheduler.settled == [("r1", 2), ("r2", 1)]


async def test_the_cache_service_learns_which_blocks_are_held(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    await stack.cache.until(lambda: stack.cache.snapshots == 1)
    [holder] = stack.cache.holders
    assert (holder.id, holder.address, holder.kv_format) == ("w1", stack.address, "format")
    prompt = list(range(1, 10))
    gateway.start("r1", [1], prompt, max_tokens=4)
    await gateway.finish(1)
    tokens = prompt + gateway.tokens[1]
    held = set(chain_hashes(chain_root("tiny", BLOCK_SIZE, ""), tokens, BLOCK_SIZE))
    assert len(held) == 3
    await stack.cache.until(lambda: stack.cache.blocks == held)
    stack.cache.replies.put(cache_pb2.PublishReply(snapshot_wanted=True, reason="test"))
    await stack.cache.until(lambda: stack.cache.snapshots == 2)
    assert stack.cache.blocks == held


async def test_the_tokenizer_is_handed_out_by_hash_in_chunks(stack: Stack) -> None:
    stub = worker_pb2_grpc.WorkerStub(stack.channel)
    chunks = [chunk async for chunk in stub.GetTokenizer(worker_pb2.GetTokenizerRequest(hash="hash"))]
    assert [(chunk.name, len(chunk.data)) for chunk in chunks] == [
        ("tokenizer.json", 1024 * 1024),
        ("tokenizer.json", 1_500_000 - 1024 * 1024),
        ("empty", 0),
    ]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.GetTokenizer(worker_pb2.GetTokenizerRequest(hash="other")).read()
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_metrics_count_what_was_done(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    for handle in (1, 2):
        gateway.start(f"r{handle}", [handle], [3] * 9, max_tokens=4)
        await gateway.finish(handle)

    def value(name: str) -> float | None:
        return stack.registry.get_sample_value(name, {"model_name": "tiny", "engine": "0"})

    assert value("vllm:generation_tokens_total") == 8
    assert value("vllm:prompt_tokens_total") == 9 + 1
    assert value("vllm:prefix_cache_queries_total") == 18
    assert value("vllm:prefix_cache_hits_total") == 8
    assert value("vllm:num_requests_running") == 0
    assert value("vllm:kv_cache_usage_perc") == 0
    assert value("headrace_engine_step_seconds_count") == 8


async def test_a_drain_lets_running_sequences_finish_and_refuses_new_ones() -> None:
    stack = Stack()
    await stack.start()
    assert await stack.health() == health_pb2.HealthCheckResponse.SERVING
    gateway = Gateway(stack.channel)
    stack.hold(after=3)
    gateway.start("r1", [1], [3, 4], max_tokens=190)
    await gateway.until(lambda: 1 in gateway.tokens)
    stopping = asyncio.create_task(stack.stop(drain_grace_s=60.0))
    await stack.scheduler.until(lambda state: state.draining)
    assert await stack.health() == health_pb2.HealthCheckResponse.NOT_SERVING
    gateway.start("r2", [2], [3])
    await gateway.finish(2)
    assert gateway.ended[2].outcome == Ended.OUTCOME_DRAINING
    stack.release()
    await gateway.finish(1)
    assert gateway.tokens[1] == stack.expected([3, 4], 190)
    assert await gateway.call.read() is grpc.aio.EOF
    await stopping
    await stack.close()


async def test_after_the_grace_what_still_runs_goes_on_elsewhere() -> None:
    stack = Stack()
    await stack.start()
    gateway = Gateway(stack.channel)
    stack.hold(after=3)
    gateway.start("r1", [1], [3, 4], max_tokens=190)
    await gateway.until(lambda: 1 in gateway.tokens)
    stopping = asyncio.create_task(stack.stop(drain_grace_s=0.0))
    await gateway.finish(1)
    stack.release()
    assert gateway.ended[1].outcome == Ended.OUTCOME_DRAINING
    assert gateway.tokens[1] == stack.expected([3, 4], 190)[: len(gateway.tokens[1])]
    await stopping
    await stack.close()


async def test_a_directive_drains_the_worker_and_another_takes_it_back(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    stack.hold(after=3)
    gateway.start("r1", [1], [3, 4], max_tokens=190)
    await gateway.until(lambda: 1 in gateway.tokens)
    stack.direct(set_draining=True)
    state = await stack.scheduler.until(lambda state: state.draining)
    assert state.running_sequences == 1
    assert state.credits == scheduler_pb2.Credits()
    assert await stack.health() == health_pb2.HealthCheckResponse.SERVING
    gateway.start("r2", [2], [3])
    await gateway.finish(2)
    assert gateway.ended[2].outcome == Ended.OUTCOME_DRAINING
    stack.direct(set_draining=True)
    stack.release()
    await gateway.finish(1)
    assert gateway.tokens[1] == stack.expected([3, 4], 190)
    await stack.scheduler.until(lambda state: state.draining and not state.running_sequences)
    stack.direct(set_draining=False)
    await stack.scheduler.until(lambda state: state.credits.sequences == 4)
    gateway.start("r3", [3], [3])  # its stream has lasted
    await gateway.finish(3)
    assert gateway.tokens[3] == stack.expected([3])


async def test_a_drained_worker_hands_on_what_outlasts_the_grace() -> None:
    stack = Stack(drain_grace_s=0.0)
    await stack.start()
    gateway = Gateway(stack.channel)
    stack.hold(after=3)
    gateway.start("r1", [1], [3, 4], max_tokens=190)
    await gateway.until(lambda: 1 in gateway.tokens)
    stack.direct(set_draining=True)
    await gateway.finish(1)
    assert gateway.ended[1].outcome == Ended.OUTCOME_DRAINING
    stack.release()
    await stack.idle()
    await gateway.told(1)
    stopping = asyncio.create_task(stack.stop())
    assert await gateway.call.read() is grpc.aio.EOF
    await stopping
    await stack.close()


async def test_what_runs_goes_on_here_if_the_drain_is_undone(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    stack.hold(after=3)
    gateway.start("r1", [1], [3, 4], max_tokens=190)
    await gateway.until(lambda: 1 in gateway.tokens)
    stack.direct(set_draining=True)
    await stack.scheduler.until(lambda state: state.draining)
    stack.direct(set_draining=False)
    await stack.scheduler.until(lambda state: not state.draining)
    stack.release()
    await gateway.finish(1)
    assert gateway.tokens[1] == stack.expected([3, 4], 190)


async def test_a_worker_that_is_about_to_end_does_not_come_back() -> None:
    stack = Stack()
    await stack.start()
    gateway = Gateway(stack.channel)
    stack.hold(after=3)
    gateway.start("r1", [1], [3, 4], max_tokens=190)
    await gateway.until(lambda: 1 in gateway.tokens)
    stopping = asyncio.create_task(stack.stop(drain_grace_s=60.0))
    await stack.scheduler.until(lambda state: state.draining)
    stack.direct(set_draining=False)
    stack.direct(set_role=scheduler_pb2.WORKER_ROLE_DECODE)  # once it is heard, so is the one before
    await stack.scheduler.until(lambda state: state.role == scheduler_pb2.WORKER_ROLE_DECODE)
    assert stack.scheduler.states[-1].draining
    stack.release()
    await gateway.finish(1)
    await stopping
    await stack.close()


async def test_a_dead_engine_ends_the_worker() -> None:
    stack = Stack()
    await stack.start()
    gateway = Gateway(stack.channel)
    stack.runner.lost = True
    for handle in range(1, 6):
        gateway.start(f"r{handle}", [handle], [3])
        if handle < 5:
            await gateway.finish(handle)
    with pytest.raises(RuntimeError, match="device lost"):
        await stack.service.stopped(asyncio.Event())
    with pytest.raises(RuntimeError, match="device lost"):
        await stack.stop(drain_grace_s=60.0)
    with pytest.raises(grpc.aio.AioRpcError):
        await gateway.until(lambda: False)
    await stack.close()


async def test_a_directive_changes_the_role_and_what_is_taken_on(stack: Stack) -> None:
    await stack.scheduler.until(lambda state: state.role == scheduler_pb2.WORKER_ROLE_BOTH)
    stack.direct(set_role=scheduler_pb2.WORKER_ROLE_DECODE)
    state = await stack.scheduler.until(lambda state: state.role == scheduler_pb2.WORKER_ROLE_DECODE)
    assert state.credits.prefill_tokens == 16, "one step's worth"
    stack.direct()
    stack.direct(set_role=scheduler_pb2.WORKER_ROLE_PREFILL)
    state = await stack.scheduler.until(lambda state: state.role == scheduler_pb2.WORKER_ROLE_PREFILL)
    assert state.credits.prefill_tokens == 64


async def test_what_a_worker_did_fills_the_time_it_took_without_a_gap(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    began = time.monotonic()
    gateway.start("r", [1, 2], list(range(1, 14)), max_tokens=6)
    await gateway.finish(1, 2)
    took_us = (time.monotonic() - began) * 1e6
    for handle in (1, 2):
        (started,) = (one for output in gateway.outputs for one in output.started if one.handle == handle)
        (ended,) = (one for output in gateway.outputs for one in output.ended if one.handle == handle)
        durations = (started.fetch_us, started.queue_us, started.prefill_us, ended.decode_us)
        assert min(durations) >= 0 and started.fetch_us == 0 and ended.HasField("decode_us")
        assert 0 < sum(durations) <= took_us


async def test_vllms_names_tell_of_every_sequence(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    gateway.start("r", [1, 2], [3, 4, 5], max_tokens=6)
    await gateway.finish(1, 2)
    assert stack.metric("llm_gpu_memory_bytes", gpu_id="cpu") > 1e6
    labels = {"model_name": "tiny", "engine": "0"}
    assert stack.metric("vllm:inter_token_latency_seconds_count", **labels) == 10
    stack.hold(after=3)
    gateway.start("gone", [3], [3, 4, 5], max_tokens=190)
    await gateway.until(lambda: 3 in gateway.tokens)
    gateway.cancel(3)
    await gateway.finish(3)
    stack.release()
    assert stack.metric("vllm:request_success_total", finished_reason="length", **labels) == 2
    assert stack.metric("vllm:request_success_total", finished_reason="abort", **labels) == 1
    assert stack.metric("vllm:request_generation_tokens_sum", **labels) == 12
    assert stack.metric("vllm:e2e_request_latency_seconds_count", **labels) == 2
    for name in ("time_to_first_token_seconds", "request_queue_time_seconds"):
        assert stack.metric(f"vllm:{name}_count", **labels) == 3
    decode, inference, whole = (
        stack.metric(f"vllm:{name}_seconds_sum", **labels)
        for name in ("request_decode_time", "request_inference_time", "e2e_request_latency")
    )
    assert 0 < decode <= inference <= whole
