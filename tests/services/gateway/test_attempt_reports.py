"""What a gateway tells schedulers of workers, over real streams. Which attempts say what: `test_witness.py`."""

import asyncio

import pytest

from headrace.v1.scheduler_pb2 import AttemptReport, GatewayHello
from headrace.v1.worker_pb2 import SequenceEnded
from services.gateway.active_request import ActiveRequests
from services.gateway.catalog import Catalog
from services.gateway.links.placement_links import PlacementLinks
from tests.services.gateway.fakes import FakeScheduler, FakeWorker, says
from tests.services.gateway.stack import TEXT, Stack, eventually, running_stack

BEGAN, FINISHED = AttemptReport.EVENT_BEGAN, AttemptReport.EVENT_FINISHED
FAILED, WITHDRAWN = AttemptReport.EVENT_FAILED, AttemptReport.EVENT_WITHDRAWN


def two_workers(**first: object) -> list[FakeWorker]:
    return [FakeWorker("w0", says(TEXT), **first), FakeWorker("w1", says(TEXT))]  # type: ignore[arg-type]


async def reported(scheduler: FakeScheduler, *events: "AttemptReport.Event.ValueType") -> list[AttemptReport]:
    async def all_came() -> bool:
        return len(scheduler.reports) >= len(events)

    await eventually(all_came)
    assert [report.event for report in scheduler.reports] == list(events)
    return scheduler.reports


async def nothing_reported(stack: Stack) -> None:
    """An answer after it comes on the same stream."""
    answers = len(stack.scheduler.answers)
    stack.scheduler.offer("nobody", 1, "1-1", stack.workers[0])

    async def answered() -> bool:
        return len(stack.scheduler.answers) > answers

    await eventually(answered)
    assert stack.scheduler.reports == []


@pytest.mark.parametrize("broken", [{"break_after": 3}, {"error": SequenceEnded(outcome=SequenceEnded.OUTCOME_FAILED)}])
async def test_a_worker_is_blamed_when_its_request_has_ended_well_elsewhere(
    redis_url: str, broken: dict[str, object]
) -> None:
    async with running_stack(redis_url, two_workers(**broken)) as stack:
        assert (await stack.complete()).json()["choices"][0]["text"] == TEXT
        [report] = await reported(stack.scheduler, FAILED)
        assert (report.worker_id, report.worker_incarnation, report.attempt) == ("w0", "1", 1)
        assert report.request_id == stack.scheduler.jobs[0].request_id
        assert not report.probe


async def test_a_request_that_kills_its_workers_blames_none(redis_url: str) -> None:
    workers = [FakeWorker(f"w{index}", says(TEXT), break_after=1) for index in range(3)]
    async with running_stack(redis_url, workers) as stack:
        assert (await stack.complete()).status_code == 500
        await nothing_reported(stack)


async def test_a_probe_that_goes_well(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        stack.scheduler.probed = {"w0"}
        await stack.complete()
        began, finished = await reported(stack.scheduler, BEGAN, FINISHED)
        assert (began.probe, finished.probe) == (True, False)


async def test_a_probe_that_fails(redis_url: str) -> None:
    async with running_stack(
        redis_url, two_workers(error=SequenceEnded(outcome=SequenceEnded.OUTCOME_FAILED))
    ) as stack:
        stack.scheduler.probed = {"w0"}
        assert (await stack.complete()).json()["choices"][0]["text"] == TEXT
        [report] = await reported(stack.scheduler, FAILED)
        assert (report.worker_id, report.probe) == ("w0", True)


INVALID = SequenceEnded(outcome=SequenceEnded.OUTCOME_FAILED, invalid_request=True, error="Too long for me.")
DRAINING = SequenceEnded(outcome=SequenceEnded.OUTCOME_DRAINING)


@pytest.mark.parametrize("mood", [{"error": INVALID}, {"error": DRAINING}, {"busy_starts": 1}])
async def test_a_probe_that_says_nothing_of_its_worker(redis_url: str, mood: dict[str, object]) -> None:
    async with running_stack(redis_url, two_workers(**mood)) as stack:
        stack.scheduler.probed = {"w0"}
        await stack.complete()
        [report] = await reported(stack.scheduler, WITHDRAWN)
        assert (report.worker_id, report.probe) == ("w0", True)


async def test_a_probe_whose_caller_leaves(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        stack.scheduler.probed = {"w0"}
        stack.workers[0].go.clear()
        completing = asyncio.create_task(stack.complete())
        await stack.workers[0].started.wait()
        completing.cancel()
        await reported(stack.scheduler, WITHDRAWN)
        stack.workers[0].go.set()


async def test_all_connected_schedulers_are_told(redis_url: str) -> None:
    schedulers = [FakeScheduler(redis_url, []) for _ in range(2)]
    for scheduler in schedulers:
        await scheduler.serve()
    addresses = [scheduler.address for scheduler in schedulers]
    hello = GatewayHello(gateway_id="g", incarnation="1")
    links = PlacementLinks(addresses, hello, ActiveRequests(), Catalog(memory_s=1, on_workers=lambda _: None))
    running = asyncio.create_task(links.run(lambda job, entry_id: None))

    async def connected() -> bool:
        return links.connected == 2

    await eventually(connected)
    links.tell(AttemptReport(event=FAILED, request_id="r"))
    for scheduler in schedulers:
        await reported(scheduler, FAILED)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    for scheduler in schedulers:
        await scheduler.stop()
