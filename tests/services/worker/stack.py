"""A whole worker over real gRPC: a real engine over a toy model, with a scheduler and a cache service that record."""

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
import torch
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
        self.lost = False  # whether every step fails from now on

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
        if self.lost:
            raise RuntimeError("device lost")
        return super().forward(batch)


class RecordingScheduler(scheduler_pb2_grpc.SchedulerServicer):
    """Takes a worker's registration and states."""

    def __init__(self) -> None:
        self.registrations: list[scheduler_pb2.Registration] = []
        self.states: list[scheduler_pb2.WorkerState] = []
        self.directives: Outbox[scheduler_pb2.WorkerDirective] = Outbox()
        self._news = asyncio.Event()

    async def Register(self, request_iterator: Any, context: Any) -> AsyncIterator[scheduler_pb2.WorkerDirective]:
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            async for directive in self.directives:
                yield directive
        finally:
            reader.cancel()

    async def _read(self, reports: AsyncIterator[scheduler_pb2.WorkerReport]) -> None:
        async for report in reports:
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
        self.digests: dict[bytes, bytes] = {}
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
                digests = unpack(report.events.stored_digests)
                self.digests.update(zip(unpack(report.events.stored), digests, strict=True))
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
        self.logprobs: dict[int, sampling_pb2.Logprobs] = {}
        self.cached: dict[int, int] = {}
        self.ended: dict[int, worker_pb2.SequenceEnded] = {}
        self.times: dict[int, worker_pb2.SequenceTime] = {}
        self.outputs: list[worker_pb2.StepOutput] = []

    def start(
        self,
        request_id: str,
        handles: Sequence[int],
        prompt: list[int],
        max_tokens: int = 8,
        attempt: int = 1,
        delivered: list[int] | None = None,
        sources: Sequence[scheduler_pb2.KvSource] = (),
        logprobs: int | None = None,
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
            sampling=sampling_pb2.Sampling(temperature=0.0, logprobs=logprobs),
            stopping=sampling_pb2.Stopping(max_tokens=max_tokens),
            scheduler_id="s1",
            kv_sources=sources,
        )
        self._commands.put(worker_pb2.ExecuteCommand(starts=[start]))

    def cancel(self, *handles: int) -> None:
        self._commands.put(worker_pb2.ExecuteCommand(cancel=worker_pb2.Cancel(handles=handles)))

    def say(self, command: worker_pb2.ExecuteCommand) -> None:
        self._commands.put(command)

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await self._read()

    async def finish(self, *handles: int) -> None:
        await self.until(lambda: self.ended.keys() >= set(handles))

    async def told(self, *handles: int) -> None:
        """Returns when the worker has told what was spent on these sequences."""
        await self.until(lambda: self.times.keys() >= set(handles))

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
        for reported in output.logprobs:
            self.logprobs.setdefault(reported.handle, sampling_pb2.Logprobs()).MergeFrom(reported.values)
        for started in output.started:
            assert len(self.tokens[started.handle]) == 1, "the first token is in the same message"
            self.cached[started.handle] = started.cached_prompt_tokens
        for ended in output.ended:
            assert ended.handle not in self.ended, "a sequence ends once"
            self.ended[ended.handle] = ended
        for time in output.times:
            assert time.handle not in self.times, "a sequence's time is told once"
            self.times[time.handle] = time


class Stack:
    """A worker with its scheduler and its cache service."""

    def __init__(self, cache: RecordingCache | None = None, **settings: Any) -> None:
        self.scheduler, self.cache = RecordingScheduler(), cache or RecordingCache()
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

    @property
    def commands(self) -> int:
        """Given to the engine's thread so far."""
        return self.service._engine._commands_sent

    async def until_commands(self, expected: int) -> None:
        while self.commands != expected:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.005)

    def direct(self, **directive: Any) -> None:
        """The scheduler wants something of the worker."""
        self.scheduler.directives.put(scheduler_pb2.WorkerDirective(**directive))

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

    def metric(self, name: str, **labels: str) -> float:
        """A sample of this worker's metrics; 0 if there is none."""
        return self.registry.get_sample_value(name, labels) or 0.0

    async def until_metric(self, expected: float, name: str, **labels: str) -> None:
        while self.metric(name, **labels) != expected:  # noqa: ASYNC110 - counters tell nobody
            await asyncio.sleep(0.005)

    async def idle(self) -> None:
        """Returns when a state says that nothing runs and every block is free."""
        await self.scheduler.until(
            lambda state: not (state.running_sequences or state.waiting_sequences) and state.free_blocks == NUM_BLOCKS
        )

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
            block_bytes=8 * BLOCK_SIZE,
            device=torch.device("cpu"),
            kv_format="format",
            tokenizer_hash="hash",
            tokenizer_files={"tokenizer.json": b"t" * 1_500_000, "empty": b""},
            summary="tiny",
            price_per_hour=settings.price_per_hour,
        )

    async def _serve(self, add: Any, servicer: Any, name: str) -> str:
        server = GrpcServer([Registration(add, servicer, f"headrace.v1.{name}")])
        self._servers.append(server)
        return f"127.0.0.1:{await server.start('127.0.0.1:0')}"


def pack(ids: list[int]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def unpack(packed: bytes) -> list[bytes]:
    return [packed[start : start + 16] for start in range(0, len(packed), 16)]
