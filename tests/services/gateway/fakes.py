"""A scheduler and workers that speak their streams over real gRPC and do as the test says; the queue is real."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from redis.asyncio import Redis

from headrace.v1.job_pb2 import Job
from headrace.v1.machine_time_pb2 import MachineTime
from headrace.v1.sampling_pb2 import FinishReason, Logprobs
from headrace.v1.scheduler_pb2 import (
    Adoption,
    AttemptReport,
    Catalog,
    CatalogEntry,
    DescribeFleetRequest,
    DescribeFleetResponse,
    GatewayMessage,
    ModelInfo,
    Offer,
    OfferAnswer,
    Placement,
    PlacementRefusal,
    PlacementRequest,
    SchedulerMessage,
)
from headrace.v1.scheduler_pb2_grpc import SchedulerServicer, add_SchedulerServicer_to_server
from headrace.v1.worker_pb2 import (
    ExecuteCommand,
    FileChunk,
    GetTokenizerRequest,
    SequenceEnded,
    SequenceStarted,
    SequenceTime,
    Start,
    StepOutput,
)
from headrace.v1.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from services.common.channel import Outbox, cancel_and_wait
from services.common.errors import Unavailable
from services.common.redis.keys import GROUP, Owner, gateway_heartbeat, queue_stream
from services.common.redis.queue import JobQueue, QueuedJob
from services.common.serve import GrpcServer, Registration
from services.common.tokenizer_hash import bundle_hash
from tests.services.gateway.tokenizers_for_tests import bundle, byte_level_tokenizer

MODEL = "org/tiny"
CONTEXT = 256
BLOCK_SIZE = 4
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class Running:
    """A sequence on a fake worker."""

    handle: int
    start: Start
    choice: int
    answer: list[int]
    done: int
    begun: bool = False


@dataclass
class FakeWorker(WorkerServicer):
    """Answers every prompt with `reply(prompt ids, choice)`, one token a step, then its end-of-sequence token.

    Fields say what goes wrong; each counts the steps of one stream.
    """

    id: str
    reply: Callable[[list[int], int], list[int]]
    files: dict[str, bytes] = field(default_factory=bundle)
    # Refuse this many starts.
    busy_starts: int = 0
    # Break the stream, or end all sequences as draining, after this many steps with tokens.
    break_after: int | None = None
    drain_after: int | None = None
    # Clear `go` after this many steps.
    pause_after: int | None = None
    error: SequenceEnded | None = None
    tokens_per_step: int = 1
    cached_prompt_tokens: int = 0
    price_per_hour: float | None = None
    # What each sequence took, told at its end, or once `go` is set after it was cancelled.
    time: MachineTime = field(default_factory=MachineTime)
    # Steps wait until this is set.
    go: asyncio.Event = field(default_factory=asyncio.Event)
    # Tokens that it makes after `max_tokens` of them.
    beyond: int = 0
    starts: list[Start] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    address: str = ""

    def __post_init__(self) -> None:
        self.go.set()
        self._server = GrpcServer([Registration(add_WorkerServicer_to_server, self, "headrace.v1.Worker")])

    def let_go(self) -> None:
        """Never pauses again."""
        self.pause_after = None
        self.go.set()

    async def serve(self) -> None:
        self.address = f"127.0.0.1:{await self._server.start('127.0.0.1:0')}"

    async def stop(self) -> None:
        await self._server.stop(0)

    async def GetTokenizer(self, request: GetTokenizerRequest, context: Context) -> AsyncIterator[FileChunk]:
        for name, data in self.files.items():
            half = len(data) // 2
            yield FileChunk(name=name, data=data[:half])
            yield FileChunk(name=name, data=data[half:])
        self.asked.set()

    async def Execute(self, commands: AsyncIterator[ExecuteCommand], context: Context) -> AsyncIterator[StepOutput]:
        running: dict[int, Running] = {}
        ended: list[SequenceEnded] = []
        dropped: list[int] = []
        news = asyncio.Event()
        reader = asyncio.create_task(self._read(commands, running, ended, dropped, news))
        step = 0
        try:
            if self.price_per_hour is not None:
                yield StepOutput(price_per_hour=self.price_per_hour)
            while True:
                await news.wait()
                await self.go.wait()
                await asyncio.sleep(0)
                if ended:
                    yield StepOutput(step=step, ended=ended)
                    ended.clear()
                if dropped:
                    yield StepOutput(step=step, times=map(self._time, dropped))
                    dropped.clear()
                if not running:
                    news.clear()
                    continue
                step += 1
                yield self._step(step, running)
                if step == self.pause_after:
                    self.go.clear()
                if self.break_after is not None and step >= self.break_after:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
                if self.drain_after is not None and step >= self.drain_after:
                    outcome = SequenceEnded.OUTCOME_DRAINING
                    yield StepOutput(ended=[SequenceEnded(handle=handle, outcome=outcome) for handle in running])
                    running.clear()
        finally:
            await cancel_and_wait([reader])

    async def _read(
        self,
        commands: AsyncIterator[ExecuteCommand],
        running: dict[int, Running],
        ended: list[SequenceEnded],
        dropped: list[int],
        news: asyncio.Event,
    ) -> None:
        async for command in commands:
            for start in command.starts:
                self._take(start, running, ended)
                self.started.set()
                news.set()
            for handle in command.cancel.handles:
                if running.pop(handle, None) is not None:
                    dropped.append(handle)
                self.cancelled.set()
                news.set()

    def _take(self, start: Start, running: dict[int, Running], ended: list[SequenceEnded]) -> None:
        self.starts.append(start)
        if self.busy_starts:
            self.busy_starts -= 1
            ended += [
                SequenceEnded(handle=choice.handle, outcome=SequenceEnded.OUTCOME_BUSY) for choice in start.choices
            ]
            return
        if self.error is not None:
            for choice in start.choices:
                failed = SequenceEnded(handle=choice.handle)
                failed.MergeFrom(self.error)
                ended.append(failed)
            return
        for choice in start.choices:
            answer = self.reply(unpack(start.prompt_ids), choice.choice)
            done = unpack(choice.delivered_ids)
            assert done == answer[: len(done)], "the gateway has delivered what this answer begins with"
            running[choice.handle] = Running(choice.handle, start, choice.choice, answer, len(done))

    def _step(self, step: int, running: dict[int, Running]) -> StepOutput:
        output = StepOutput(step=step)
        eos = byte_level_tokenizer().token_to_id("<|im_end|>")
        counts = []
        for sequence in list(running.values()):
            stopping = sequence.start.stopping
            most = stopping.max_tokens + self.beyond
            limit = min(sequence.done + self.tokens_per_step, most)
            tokens = [*sequence.answer, eos][sequence.done : limit]
            if sequence.start.sampling.HasField("logprobs"):
                values = logprobs_of(tokens, sequence.done, sequence.start.sampling.logprobs)
                output.logprobs.add(handle=sequence.handle, values=values)
            sequence.done += len(tokens)
            output.handles.append(sequence.handle)
            output.token_ids.extend(tokens)
            counts.append(len(tokens))
            if not sequence.begun:
                sequence.begun = True
                output.started.append(
                    SequenceStarted(handle=sequence.handle, cached_prompt_tokens=self.cached_prompt_tokens)
                )
            if eos in tokens or sequence.done >= most:
                stop, length = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH
                output.ended.append(
                    SequenceEnded(
                        handle=sequence.handle,
                        outcome=SequenceEnded.OUTCOME_FINISHED,
                        finish_reason=stop if eos in tokens else length,
                    )
                )
                output.times.append(self._time(sequence.handle))
                del running[sequence.handle]
        if self.tokens_per_step != 1:
            output.token_counts.extend(counts)
        return output

    def _time(self, handle: int) -> SequenceTime:
        return SequenceTime(handle=handle, time=self.time)


class FakeScheduler(SchedulerServicer):
    """Pops jobs from the real queue as they come and offers them to workers in turn."""

    def __init__(self, redis_url: str, workers: list[FakeWorker]) -> None:
        self.redis_url = redis_url
        self.workers = workers
        self.entry_ids: list[str] = []
        self.answers: list[OfferAnswer] = []
        self.requests: list[PlacementRequest] = []
        self.jobs: list[Job] = []
        self.reports: list[AttemptReport] = []
        # What it says of its fleet, and how often it was asked.
        self.fleet = DescribeFleetResponse(scheduler_id="s")
        self.described = 0
        # Workers whose placements are probes, and watched.
        self.probed: set[str] = set()
        # Offers wait until this is set.
        self.go = asyncio.Event()
        self.go.set()
        # Refuse every placement request for this reason.
        self.refuse: str | None = None
        self.refuse_permanently = False
        self.popped = asyncio.Event()
        self.queue = JobQueue(redis_url, Owner("scheduler", "s", "1"))
        self.outboxes: list[Outbox[SchedulerMessage]] = []
        self._turn = 0
        self._popping: asyncio.Task[None] | None = None
        self._server = GrpcServer([Registration(add_SchedulerServicer_to_server, self, "headrace.v1.Scheduler")])
        self.address = ""

    async def serve(self, port: int = 0) -> None:
        self.address = f"127.0.0.1:{await self._server.start(f'127.0.0.1:{port}')}"
        self.start_popping()

    def start_popping(self) -> None:
        self.arrivals = self.queue.arrivals(MODEL)
        self._popping = asyncio.create_task(self._pop())

    async def stop_popping(self) -> None:
        if self._popping is not None:
            with contextlib.suppress(Unavailable):
                await self.arrivals.interrupt()
            await cancel_and_wait([self._popping])

    async def stop(self) -> None:
        for outbox in self.outboxes:
            outbox.close()
        await self.stop_popping()
        await self._server.stop(0)
        await self.arrivals.close()
        await self.queue.close()

    async def Place(self, messages: AsyncIterator[GatewayMessage], context: Context) -> AsyncIterator[SchedulerMessage]:
        outbox: Outbox[SchedulerMessage] = Outbox()
        outbox.put(SchedulerMessage(catalog=self.catalog()))
        self.outboxes.append(outbox)
        reader = asyncio.create_task(self._read(messages, outbox))
        try:
            async for message in outbox:
                yield message
        finally:
            self.outboxes.remove(outbox)
            await cancel_and_wait([reader])

    async def DescribeFleet(self, request: DescribeFleetRequest, context: Context) -> DescribeFleetResponse:
        self.described += 1
        return self.fleet

    def catalog(self) -> Catalog:
        info = ModelInfo(
            name=MODEL,
            max_context_tokens=CONTEXT,
            vocabulary_size=byte_level_tokenizer().get_vocab_size(),
            block_size=BLOCK_SIZE,
            tokenizer_hash=bundle_hash(bundle()),
        )
        addresses = [worker.address for worker in self.workers]
        return Catalog(entries=[CatalogEntry(model=info, worker_addresses=addresses)] if addresses else [])

    def announce(self) -> None:
        for outbox in self.outboxes:
            outbox.put(SchedulerMessage(catalog=self.catalog()))

    async def orphan(self, job: Job, entry_id: str) -> None:
        """Takes the entry from its gateway, as if that were dead, and offers the job to every other gateway."""
        heartbeat = gateway_heartbeat(job.gateway_id, job.gateway_incarnation)
        stream, consumer = queue_stream(job.model, job.priority), Owner("scheduler", "s", "1").consumer
        async with Redis.from_url(self.redis_url) as redis:
            await redis.delete(heartbeat)
            await redis.xclaim(stream, GROUP, consumer, 0, [entry_id])
        for outbox in self.outboxes:
            outbox.put(SchedulerMessage(adoption=Adoption(job=job, queue_entry_id=entry_id)))

    def offer(self, request_id: str, attempt: int, entry_id: str, worker: FakeWorker) -> None:
        probe = worker.id in self.probed
        placement = Placement(
            worker_id=worker.id,
            worker_incarnation="1",
            worker_address=worker.address,
            scheduler_id="s",
            kv_format=f"format of {worker.id}",
            watched=probe,
            probe=probe,
        )
        offer = Offer(request_id=request_id, attempt=attempt, queue_entry_id=entry_id, placement=placement)
        for outbox in self.outboxes:
            outbox.put(SchedulerMessage(offers=[offer]))

    async def _pop(self) -> None:
        while True:
            try:
                await self._offer_all(await self.queue.pop(MODEL, 100))
                await self._offer_all((await self.arrivals.next(100, 1.0)).jobs)
            except Unavailable:
                await asyncio.sleep(0.05)

    async def _offer_all(self, jobs: Iterable[QueuedJob]) -> None:
        for queued in jobs:
            self.jobs.append(queued.job)
            self.entry_ids.append(queued.entry_id)
            self.popped.set()
            await self.go.wait()
            worker = self.workers[self._turn % len(self.workers)]
            self._turn += 1
            self.offer(queued.job.request_id, 1, queued.entry_id, worker)

    async def _read(self, messages: AsyncIterator[GatewayMessage], outbox: Outbox[SchedulerMessage]) -> None:
        async for message in messages:
            self.answers += message.answers
            if message.HasField("placement_request"):
                self._place_again(message.placement_request, outbox)
            elif message.HasField("attempt_report"):
                self.reports.append(message.attempt_report)

    def _place_again(self, request: PlacementRequest, outbox: Outbox[SchedulerMessage]) -> None:
        self.requests.append(request)
        if self.refuse is not None:
            refusal = PlacementRefusal(
                request_id=request.job.request_id,
                attempt=request.attempt,
                reason=self.refuse,
                permanent=self.refuse_permanently,
            )
            outbox.put(SchedulerMessage(refusal=refusal))
            return
        others = [worker for worker in self.workers if worker.id != request.tried_worker_id] or self.workers
        self.offer(request.job.request_id, request.attempt, request.queue_entry_id, others[0])


def unpack(packed: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(packed) // 4}I", packed))


def logprobs_of(tokens: list[int], position: int, count: int) -> Logprobs:
    """What a fake worker reports of tokens that begin at that position of its answer."""
    values, vocabulary = Logprobs(), byte_level_tokenizer().get_vocab_size()
    for at, token in enumerate(tokens, position):
        values.token_logprobs.append(-at / 8)
        values.top_ids.extend((token + rank) % vocabulary for rank in range(count))
        values.top_logprobs.extend(-at / 8 - rank for rank in range(count))
    return values


def says(text: str) -> Callable[[list[int], int], list[int]]:
    """A reply that is always this text."""
    token_ids = byte_level_tokenizer().encode(text).ids
    return lambda _prompt, _choice: token_ids


@contextlib.asynccontextmanager
async def running_worker(worker: FakeWorker) -> AsyncIterator[FakeWorker]:
    await worker.serve()
    try:
        yield worker
    finally:
        await worker.stop()
