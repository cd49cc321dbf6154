"""One Execute stream to each worker, shared by all requests: starts and cancels go up, every step's tokens come down.

A step's message is dealt out to the feeds of its sequences. A stream that breaks, or falls silent, ends all its feeds
as lost or stalled. Knows nothing of text or of placements.
"""

import asyncio
import logging
import time
from collections.abc import Iterable
from enum import StrEnum
from itertools import islice

import grpc.aio

from headrace.v1.sampling_pb2 import FinishReason, Logprobs
from headrace.v1.worker_pb2 import (
    Cancel,
    ExecuteCommand,
    ExecuteHello,
    SequenceEnded,
    SequenceStarted,
    Start,
    StartChoice,
    StepOutput,
)
from headrace.v1.worker_pb2_grpc import WorkerStub
from services.common.channel import Outbox, cancel_and_wait, dial
from services.gateway.costs.spending import Spending
from services.gateway.direct import DirectDelivery, StepTally
from services.gateway.time_budget import RunTimes, now_us

log = logging.getLogger(__name__)

_WATCH_EVERY_S = 1.0
_MOST_UNTOLD = 10_000
# A watch that comes later than this says nothing of the workers: the gateway itself had no CPU.
_LATE_S = 2.0
# Commands that wait together become one message up to this size, far below what a message may have.
_MOST_MERGED_BYTES = 1024 * 1024


class Outcome(StrEnum):
    """How a sequence ended on its worker."""

    FINISHED = "finished"
    BUSY = "busy"
    DRAINING = "draining"
    FAILED = "failed"
    LOST = "lost"
    STALLED = "stalled"


_OUTCOMES = {
    SequenceEnded.OUTCOME_FINISHED: Outcome.FINISHED,
    SequenceEnded.OUTCOME_BUSY: Outcome.BUSY,
    SequenceEnded.OUTCOME_DRAINING: Outcome.DRAINING,
    SequenceEnded.OUTCOME_FAILED: Outcome.FAILED,
}


class SequenceFeed:
    """What one sequence's worker has sent and its request has not read."""

    __slots__ = (
        "cached_prompt_tokens",
        "direct",
        "error",
        "finish_reason",
        "handle",
        "invalid_request",
        "logprobs",
        "news",
        "outcome",
        "times",
        "token_ids",
    )

    def __init__(self, handle: int, news: asyncio.Event) -> None:
        self.handle = handle
        # Set whenever something has come.
        self.news = news
        self.token_ids: list[int] = []
        # Where its tokens go at once, if they can.
        self.direct: DirectDelivery | None = None
        # Of `token_ids`, if they were asked for.
        self.logprobs: Logprobs | None = None
        self.cached_prompt_tokens: int | None = None
        # None while it runs.
        self.outcome: Outcome | None = None
        self.finish_reason: FinishReason.ValueType = FinishReason.FINISH_REASON_UNSPECIFIED
        self.error = ""
        self.invalid_request = False
        self.times = RunTimes()

    def receive(self, token_ids: list[int], tally: StepTally, *, ending: bool) -> None:
        """Takes tokens; `ending`: they are the last ones."""
        direct = self.direct
        if direct is None or ending or self.token_ids or not token_ids or not direct.deliver(token_ids, tally):
            self.token_ids += token_ids
            self.news.set()

    def take_tokens(self) -> list[int]:
        token_ids, self.token_ids = self.token_ids, []
        return token_ids

    def take_logprobs(self) -> Logprobs | None:
        logprobs, self.logprobs = self.logprobs, None
        return logprobs

    def add_logprobs(self, values: Logprobs) -> None:
        if self.logprobs is None:
            self.logprobs = Logprobs()
        self.logprobs.MergeFrom(values)

    def begin(self, started: SequenceStarted) -> None:
        self.cached_prompt_tokens = started.cached_prompt_tokens
        times = self.times
        times.begun_at = now_us()
        times.fetch, times.queue, times.prefill = started.fetch_us, started.queue_us, started.prefill_us

    def end(self, outcome: Outcome, error: str = "") -> None:
        self.outcome, self.error = outcome, error
        self.times.ended_at = now_us()
        self.news.set()


class WorkerLink:
    """The stream to one worker, while it lives."""

    def __init__(self, address: str, hello: ExecuteHello) -> None:
        self.address = address
        self.outbox: Outbox[ExecuteCommand] = Outbox(_merge)
        self.outbox.put(ExecuteCommand(hello=hello))
        now = asyncio.get_running_loop().time()
        self.heard_at = now
        # When the worker's step counter last moved, or there was nothing for it to move for.
        self.moved_at = now
        self._step = 0
        self._feeds: dict[int, SequenceFeed] = {}
        self._last_handle = 0
        self.price_per_hour: float | None = None
        # By handle, of sequences whose worker has not told what it spent on them, the oldest first.
        self._untold: dict[int, Spending] = {}
        self.stalled = False
        """It is given up, since it was silent or its engine stood still."""
        self.broken = False

    @property
    def idle(self) -> bool:
        return not self._feeds

    def start(
        self, start: Start, choices: Iterable[tuple[int, bytes]], news: asyncio.Event, spending: Spending
    ) -> list[SequenceFeed]:
        """Starts one sequence for each (choice index, delivered ids). Their feeds come in the same order. `spending` is
        told what each took, once, whether or not it was cancelled before.
        """
        feeds = []
        if self.idle:
            self.moved_at = asyncio.get_running_loop().time()
        for index, delivered_ids in choices:
            self._last_handle += 1
            feed = SequenceFeed(self._last_handle, news)
            start.choices.append(StartChoice(handle=feed.handle, choice=index, delivered_ids=delivered_ids))
            self._feeds[feed.handle] = feed
            feeds.append(feed)
            self._expect(feed.handle, spending)
        self.outbox.put(ExecuteCommand(starts=[start]))
        return feeds

    def cancel(self, feeds: Iterable[SequenceFeed]) -> None:
        """Stops those of the sequences that still run; nothing more comes into their feeds."""
        handles = [feed.handle for feed in feeds if self._feeds.pop(feed.handle, None) is not None]
        if handles and not self.broken:
            self.outbox.put(ExecuteCommand(cancel=Cancel(handles=handles)))

    def receive(self, output: StepOutput) -> None:
        """Deals one step's output out."""
        self.heard_at = asyncio.get_running_loop().time()
        if output.step != self._step or self.idle:
            self._step, self.moved_at = output.step, self.heard_at
        feeds = self._feeds
        for started in output.started:
            if feed := feeds.get(started.handle):
                feed.begin(started)
        if output.handles:
            self._receive_tokens(output)
        for reported in output.logprobs:
            if feed := feeds.get(reported.handle):
                feed.add_logprobs(reported.values)
        for ended in output.ended:
            if feed := feeds.pop(ended.handle, None):
                _end(feed, ended)
        for told in output.times:
            if spending := self._untold.pop(told.handle, None):
                spending.receive(told, self.price_per_hour)
        if output.HasField("price_per_hour"):
            self._learn_price(output.price_per_hour)

    def excuse(self, seconds: float) -> None:
        """Leaves out a time in which this process could hear nothing."""
        self.heard_at += seconds
        self.moved_at += seconds

    def lose(self, reason: str) -> None:
        """The stream is broken, or given up: all its sequences are lost."""
        self.broken = True
        self.outbox.close()
        feeds, self._feeds = self._feeds, {}
        for feed in feeds.values():
            feed.end(Outcome.STALLED if self.stalled else Outcome.LOST, reason)
        untold, self._untold = self._untold, {}
        for spending in untold.values():
            spending.lose()

    def _expect(self, handle: int, spending: Spending) -> None:
        spending.expect()
        spending.priced = spending.priced or bool(self.price_per_hour)
        self._untold[handle] = spending
        if len(self._untold) > _MOST_UNTOLD:  # a worker of another version, that tells nothing
            self._untold.pop(next(iter(self._untold))).lose()

    def _learn_price(self, price_per_hour: float) -> None:
        """The first message of the stream has come, behind which sequences may have been started."""
        self.price_per_hour = price_per_hour
        for spending in self._untold.values():
            spending.priced = spending.priced or price_per_hour > 0

    def _receive_tokens(self, output: StepOutput) -> None:
        tally = StepTally(time.monotonic())
        ending = {ended.handle for ended in output.ended}
        for handle, token_ids in _runs(output):
            if feed := self._feeds.get(handle):
                feed.receive(token_ids, tally, ending=handle in ending)
        tally.close()


class WorkerLinks:
    """The links to all workers: opened when the catalog names a worker or a sequence is started on it."""

    def __init__(self, hello: ExecuteHello, *, silence_s: float, stall_s: float) -> None:
        self._hello = hello
        self._silence_s = silence_s
        self._stall_s = stall_s
        self._links: dict[str, tuple[WorkerLink, asyncio.Task[None]]] = {}
        self._wanted: frozenset[str] = frozenset()
        # Loop time of the last watch.
        self._watched_at = asyncio.get_running_loop().time()

    def follow(self, addresses: frozenset[str]) -> None:
        """Keeps links to these workers, and those to others only while they are in use."""
        self._wanted = addresses
        for address in addresses:
            self.get(address)

    def get(self, address: str) -> WorkerLink:
        """The living link to a worker, opened now if there is none."""
        if address in self._links:
            return self._links[address][0]
        link = WorkerLink(address, self._hello)
        task = asyncio.create_task(self._keep(link), name=f"worker {address}")
        self._links[address] = (link, task)
        return link

    async def run(self) -> None:
        """Watches the links until cancelled, then closes them all."""
        loop = asyncio.get_running_loop()
        self._watched_at = loop.time()
        try:
            while True:
                await asyncio.sleep(_WATCH_EVERY_S)
                self.watch(loop.time())
        finally:
            await cancel_and_wait([task for _link, task in self._links.values()])

    def watch(self, now: float) -> None:
        """Gives up the links that are silent, stalled or of no use any more at this loop time; due every second."""
        late_s, self._watched_at = now - self._watched_at - _WATCH_EVERY_S, now
        if late_s > _LATE_S:
            # What the workers have sent meanwhile is not read yet.
            for link, _task in self._links.values():
                link.excuse(late_s)
        for link, task in list(self._links.values()):
            silent = now - link.heard_at > self._silence_s
            stalled = not link.idle and now - link.moved_at > self._stall_s
            if silent or stalled:
                log.warning("worker %s: %s", link.address, "no sign of life" if silent else "its engine stands still")
                link.stalled = True
            if silent or stalled or (link.idle and link.address not in self._wanted):
                task.cancel()

    async def _keep(self, link: WorkerLink) -> None:
        """Reads the stream until it breaks or is given up."""
        reason = "the stream to the worker was given up"
        try:
            async with dial(link.address) as channel:
                async for output in WorkerStub(channel).Execute(link.outbox):
                    link.receive(output)
            reason = "the worker ended its stream"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except Exception:
            log.exception("worker %s: the stream failed", link.address)
            reason = "the stream to the worker failed"
        finally:
            log.info("worker %s: disconnected: %s", link.address, reason)
            del self._links[link.address]
            link.lose(reason)


def _runs(output: StepOutput) -> Iterable[tuple[int, list[int]]]:
    """The tokens of each handle."""
    if not output.token_counts:
        return zip(output.handles, ([token_id] for token_id in output.token_ids), strict=True)
    token_ids = iter(output.token_ids)
    return [
        (handle, list(islice(token_ids, count)))
        for handle, count in zip(output.handles, output.token_counts, strict=True)
    ]


def _merge(command: ExecuteCommand, following: ExecuteCommand) -> bool:
    if command.HasField("hello") or command.ByteSize() > _MOST_MERGED_BYTES:
        return False
    command.MergeFrom(following)
    return True


def _end(feed: SequenceFeed, ended: SequenceEnded) -> None:
    outcome = _OUTCOMES.get(ended.outcome, Outcome.FAILED)
    if ended.HasField("decode_us"):
        feed.times.decode = ended.decode_us
    if outcome is not Outcome.FINISHED:
        feed.invalid_request = ended.invalid_request
        feed.end(outcome, ended.error)
    elif ended.finish_reason in (FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH):
        feed.finish_reason = ended.finish_reason
        feed.end(outcome)
    else:
        feed.end(Outcome.FAILED, "the worker ended the sequence without a reason")
