"""Dealing a worker's steps out, without a network."""

import asyncio

from headrace.v1.sampling_pb2 import FinishReason
from headrace.v1.worker_pb2 import ExecuteHello, SequenceEnded, SequenceStarted, Start, StepOutput
from services.gateway.costs.spending import Spending
from services.gateway.links.worker_links import Outcome, SequenceFeed, WorkerLink, WorkerLinks
from tests.services.gateway.fakes import FakeWorker, running_worker, says


def started_link(count: int) -> tuple[WorkerLink, list[SequenceFeed]]:
    link = WorkerLink("nowhere", ExecuteHello())
    return link, link.start(
        Start(request_id="r"), [(index, b"") for index in range(count)], asyncio.Event(), Spending()
    )


async def test_every_sequence_gets_a_handle_of_its_own() -> None:
    link, feeds = started_link(3)
    more = link.start(Start(), [(0, b"")], asyncio.Event(), Spending())
    assert len({feed.handle for feed in [*feeds, *more]}) == 4


async def test_one_token_each() -> None:
    link, feeds = started_link(2)
    link.receive(StepOutput(step=1, handles=[feeds[1].handle, 999, feeds[0].handle], token_ids=[11, 99, 10]))
    assert [feed.take_tokens() for feed in feeds] == [[10], [11]]
    assert [feed.take_tokens() for feed in feeds] == [[], []]
    assert feeds[0].news.is_set()


async def test_several_tokens_each() -> None:
    link, feeds = started_link(2)
    handles = [feeds[0].handle, 999, feeds[1].handle]
    link.receive(StepOutput(step=1, handles=handles, token_ids=[1, 2, 9, 3], token_counts=[2, 1, 1]))
    assert [feed.take_tokens() for feed in feeds] == [[1, 2], [3]]


async def test_start_and_end_of_a_sequence() -> None:
    link, (feed,) = started_link(1)
    started = SequenceStarted(handle=feed.handle, cached_prompt_tokens=16)
    ended = SequenceEnded(
        handle=feed.handle,
        outcome=SequenceEnded.OUTCOME_FINISHED,
        finish_reason=FinishReason.FINISH_REASON_STOP,
    )
    link.receive(StepOutput(step=1, handles=[feed.handle], token_ids=[5], started=[started], ended=[ended]))
    assert (feed.cached_prompt_tokens, feed.outcome, feed.take_tokens()) == (16, Outcome.FINISHED, [5])
    assert feed.finish_reason == FinishReason.FINISH_REASON_STOP
    assert link.idle


async def test_an_end_without_a_reason_is_a_failure() -> None:
    link, (feed,) = started_link(1)
    link.receive(StepOutput(ended=[SequenceEnded(handle=feed.handle, outcome=SequenceEnded.OUTCOME_FINISHED)]))
    assert feed.outcome is Outcome.FAILED


async def test_nothing_comes_after_a_cancel() -> None:
    link, feeds = started_link(2)
    link.cancel([feeds[0]])
    link.receive(StepOutput(step=1, handles=[feed.handle for feed in feeds], token_ids=[1, 2]))
    assert [feed.take_tokens() for feed in feeds] == [[], [2]]


async def test_a_broken_stream_loses_its_sequences() -> None:
    link, feeds = started_link(2)
    link.lose("gone")
    assert [feed.outcome for feed in feeds] == [Outcome.LOST, Outcome.LOST]


async def test_a_time_in_which_the_gateway_stood_still_is_not_the_workers() -> None:
    links = WorkerLinks(ExecuteHello(gateway_id="g"), silence_s=10.0, stall_s=20.0)
    async with running_worker(FakeWorker("w0", says("x"))) as worker:
        worker.go.clear()
        link = links.get(worker.address)
        (feed,) = link.start(Start(), [(0, b"")], asyncio.Event(), Spending())
        await worker.started.wait()
        later = asyncio.get_running_loop().time() + 3600
        links.watch(later)
        worker.started.clear()
        link.start(Start(), [(0, b"")], asyncio.Event(), Spending())
        await asyncio.wait_for(worker.started.wait(), 10)  # the stream is there still
        assert links.get(worker.address) is link and feed.outcome is None
        for second in range(1, 12):
            links.watch(later + second)
        await asyncio.wait_for(feed.news.wait(), 10)
        assert feed.outcome is Outcome.STALLED
        worker.go.set()


async def test_a_silent_worker_counts_as_broken() -> None:
    links = WorkerLinks(ExecuteHello(gateway_id="g"), silence_s=2.0, stall_s=60.0)
    async with running_worker(FakeWorker("w0", says("x"))) as worker:
        worker.go.clear()
        watching = asyncio.create_task(links.run())
        link = links.get(worker.address)
        (feed,) = link.start(Start(), [(0, b"")], asyncio.Event(), Spending())
        await worker.started.wait()
        await asyncio.wait_for(feed.news.wait(), 10)
        assert feed.outcome is Outcome.STALLED
        assert links.get(worker.address) is not link
        worker.go.set()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
