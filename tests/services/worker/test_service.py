"""A whole worker over real gRPC: a real engine over a toy model, with a scheduler and a cache service that record."""

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from torch import Tensor

from headrace.v1 import (
    cache_pb2,
    cache_pb2_grpc,
    sampling_pb2,
    scheduler_pb2,
    scheduler_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from services.common.block_hash import chain_hashes, chain_root
from services.common.channel import Outbox, dial
from services.common.serve import GrpcServer, Registration
from services.worker.build import LoadedModel
from services.worker.config import WorkerSettings
from services.worker.engine.batcher import Batch, Batcher
from services.worker.engine.batching_policy import ContinuousBatching
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.engine import Engine
from services.worker.service import WorkerService
from services.worker.start_request import ModelLimits
from tests.fakes import FakeRunner, make_sequence

BLOCK_SIZE = 4
NUM_BLOCKS = 64
CONTEXT = 200
Ended = worker_pb2.SequenceEnded


class GatedRunner(FakeRunner):
    """A toy model that computes no more steps than it may, so that a test can act in the middle of a sequence."""

    def __init__(self) -> None:
        super().__init__(NUM_BLOCKS, BLOCK_SIZE)
        self._changed = threading.Condition()
        self._steps_left: int | None = None

    def allow(self, steps: int | None) -> None:
        """So many more steps; None: any number."""
        with self._changed:
            self._steps_left = steps
            self._changed.notify()

    def forward(self, batch: Batch) -> Tensor:
        with self._changed:
            assert self._changed.wait_for(lambda: self._steps_left != 0, timeout=60), "a test held the engine for good"
            if self._steps_left is not None:
                self._steps_left -= 1
        return super().forward(batch)


class RecordingScheduler(scheduler_pb2_grpc.SchedulerServicer):
    """Takes a worker's registration and states."""

    def __init__(self) -> None:
        self.registrations: list[scheduler_pb2.Registration] = []
        self.states: list[scheduler_pb2.WorkerState] = []
        self._news = asyncio.Event()

    async def Register(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        async for report in request_iterator:
            if report.HasField("registration"):
                self.registrations.append(report.registration)
            else:
                self.states.append(report.state)
            self._news.set()

    async def until(self, holds: Callable[[scheduler_pb2.WorkerState], bool]) -> scheduler_pb2.WorkerState:
        """The first state, from now on or the last one, of which this holds."""
        seen = max(0, len(self.states) - 1)
        while True:
            for state in self.states[seen:]:
                if holds(state):
                    return state
            seen = len(self.states)
            self._news.clear()
            await self._news.wait()

    @property
    def settled(self) -> list[tuple[str, int]]:
        return [(key.request_id, key.attempt) for state in self.states for key in state.settled]


class RecordingCache(cache_pb2_grpc.CacheServicer):
    """Takes a worker's block events; asks for snapshots when told to."""

    def __init__(self) -> None:
        self.holders: list[cache_pb2.Holder] = []
        self.blocks: set[bytes] = set()
        self.snapshots = 0
        self.replies: Outbox[cache_pb2.PublishReply] = Outbox()
        self._news = asyncio.Event()

    async def Publish(self, request_iterator: Any, context: Any) -> AsyncIterator[cache_pb2.PublishReply]:
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            async for reply in self.replies:
                yield reply
        finally:
            reader.cancel()

    async def _read(self, reports: AsyncIterator[cache_pb2.BlockReport]) -> None:
        sequence = 0
        async for report in reports:
            if report.HasField("hello"):
                self.holders.append(report.hello.holder)
            else:
                sequence += 1
                assert report.events.sequence == sequence
                if report.events.snapshot:
                    self.snapshots += 1
                    self.blocks.clear()
                self.blocks -= set(unpack(report.events.removed))
                self.blocks |= set(unpack(report.events.stored))
            self._news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._news.clear()
            await self._news.wait()


class Gateway:
    """A gateway's Execute stream, and what came down it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._commands: Outbox[worker_pb2.ExecuteCommand] = Outbox()
        self.call = worker_pb2_grpc.WorkerStub(channel).Execute(self._commands)
        self._commands.put(worker_pb2.ExecuteCommand(hello=worker_pb2.ExecuteHello(gateway_id="g1")))
        self.tokens: dict[int, list[int]] = {}
        self.cached: dict[int, int] = {}
        self.ended: dict[int, worker_pb2.SequenceEnded] = {}
        self.outputs: list[worker_pb2.StepOutput] = []

    def start(
        self,
        request_id: str,
        handles: Sequence[int],
        prompt: list[int],
        max_tokens: int = 8,
        attempt: int = 1,
        delivered: list[int] | None = None,
    ) -> None:
        choices = [
            worker_pb2.StartChoice(handle=handle, choice=index, delivered_ids=pack(delivered or []))
            for index, handle in enumerate(handles)
        ]
        start = worker_pb2.Start(
            request_id=request_id,
            attempt=attempt,
            prompt_ids=pack(prompt),
            choices=choices,
            sampling=sampling_pb2.Sampling(temperature=0.0),
            stopping=sampling_pb2.Stopping(max_tokens=max_tokens),
            scheduler_id="s1",
        )
        self._commands.put(worker_pb2.ExecuteCommand(start=start))

    def cancel(self, *handles: int) -> None:
        self._commands.put(worker_pb2.ExecuteCommand(cancel=worker_pb2.Cancel(handles=handles)))

    def say(self, command: worker_pb2.ExecuteCommand) -> None:
        self._commands.put(command)

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await self._read()

    async def finish(self, *handles: int) -> None:
        await self.until(lambda: self.ended.keys() >= set(handles))

    async def sign_of_life(self) -> worker_pb2.StepOutput:
        before = len(self.outputs)
        await self.until(lambda: len(self.outputs) > before and not self.outputs[-1].handles)
        return self.outputs[-1]

    async def _read(self) -> None:
        output = await self.call.read()
        assert isinstance(output, worker_pb2.StepOutput), "the stream has ended"
        self.outputs.append(output)
        counts = output.token_counts or [1] * len(output.handles)
        token_ids = iter(output.token_ids)
        for handle, count in zip(output.handles, counts, strict=True):
            assert handle not in self.ended, "no token after the end"
            self.tokens.setdefault(handle, []).extend(next(token_ids) for _ in range(count))
        assert next(token_ids, None) is None
        for started in output.started:
            assert len(self.tokens[started.handle]) == 1, "the first token is in the same message"
            self.cached[started.handle] = started.cached_prompt_tokens
        for ended in output.ended:
            assert ended.handle not in self.ended, "a sequence ends once"
            self.ended[ended.handle] = ended


class Stack:
    """A worker with its scheduler and its cache service."""

    def __init__(self, **settings: Any) -> None:
        self.scheduler, self.cache = RecordingScheduler(), RecordingCache()
        self.registry = CollectorRegistry()
        self.runner = GatedRunner()
        self._settings = settings
        self._servers: list[GrpcServer] = []

    async def start(self) -> None:
        schedulers = await self._serve(scheduler_pb2_grpc.add_SchedulerServicer_to_server, self.scheduler, "Scheduler")
        caches = await self._serve(cache_pb2_grpc.add_CacheServicer_to_server, self.cache, "Cache")
        given = {"max_sequences": 4, "max_batch_tokens": 16, "max_pending_prefill_tokens": 64, **self._settings}
        settings = WorkerSettings(id="w1", port=0, schedulers=(schedulers,), caches=(caches,), **given)
        self.service = WorkerService(settings, self._model(settings), self.registry)
        self.address = await self.service.start()
        self.channel = dial(self.address)

    def hold(self, after: int = 0) -> None:
        """Lets the engine do `after` more steps, beside the one that it is in."""
        self.runner.allow(after)

    def release(self) -> None:
        self.runner.allow(None)

    async def stop(self, drain_grace_s: float = 0.0) -> None:
        await self.service.stop(drain_grace_s)

    async def close(self) -> None:
        await self.channel.close()
        for server in self._servers:
            await server.stop(0)

    async def health(self) -> "health_pb2.HealthCheckResponse.ServingStatus.ValueType":
        answer = await health_pb2_grpc.HealthStub(self.channel).Check(  # type: ignore[attr-defined]
            health_pb2.HealthCheckRequest()
        )
        return answer.status  # type: ignore[no-any-return]

    def expected(self, prompt: list[int], max_tokens: int = 8) -> list[int]:
        return self.runner.expected_tokens(make_sequence(0, prompt, max_tokens))[len(prompt) :]

    def _model(self, settings: WorkerSettings) -> LoadedModel:
        pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        batcher = Batcher(
            pool,
            max_sequences=settings.max_sequences,
            max_batch_tokens=settings.max_batch_tokens,
            policy=ContinuousBatching(),
        )
        return LoadedModel(
            engine=Engine(self.runner, pool, batcher, max_context=CONTEXT),
            limits=ModelLimits("tiny", 31, CONTEXT, BLOCK_SIZE, frozenset(), settings.max_sequences),
            num_blocks=NUM_BLOCKS,
            kv_format="format",
            tokenizer_hash="hash",
            tokenizer_files={"tokenizer.json": b"t" * 1_500_000, "empty": b""},
            summary="tiny",
        )

    async def _serve(self, add: Any, servicer: Any, name: str) -> str:
        server = GrpcServer([Registration(add, servicer, f"headrace.v1.{name}")])
        self._servers.append(server)
        return f"127.0.0.1:{await server.start('127.0.0.1:0')}"


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    stack = Stack()
    await stack.start()
    yield stack
    await stack.stop()
    await stack.close()


def pack(ids: list[int]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def unpack(packed: bytes) -> list[bytes]:
    return [packed[start : start + 16] for start in range(0, len(packed), 16)]


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


async def test_moving_kv_is_unimplemented(stack: Stack) -> None:
    stub = worker_pb2_grpc.WorkerStub(stack.channel)
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: stub.Prefill(worker_pb2.PrefillRequest()).read(),
        lambda: stub.FetchBlocks(cache_pb2.FetchBlocksRequest()).read(),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call()
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


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


async def test_a_dead_engine_ends_the_worker() -> None:
    stack = Stack()
    await stack.start()
    gateway = Gateway(stack.channel)

    def fail(batch: object) -> Any:
        raise RuntimeError("device lost")

    stack.runner.forward = fail  # type: ignore[method-assign]
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
