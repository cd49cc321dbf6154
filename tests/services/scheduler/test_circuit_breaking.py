"""Workers that fail, as gateways tell a scheduler, and what it places on them then."""

from collections.abc import AsyncIterator

import pytest

from headrace.v1.job_pb2 import Job
from headrace.v1.scheduler_pb2 import AttemptReport, DescribeFleetRequest, FleetWorker, Offer, OfferAnswer
from headrace.v1.scheduler_pb2 import PlacementRequest as Request
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from services.common.channel import dial
from tests.services.scheduler.fakes import MODEL, FakeGateway, FakeWorker, RunningScheduler, running_scheduler

BEGAN, FINISHED, FAILED = AttemptReport.EVENT_BEGAN, AttemptReport.EVENT_FINISHED, AttemptReport.EVENT_FAILED
SHORT = {"breaker_failures": 1, "breaker_backoff_s": 0.05, "breaker_longest_backoff_s": 0.1}
LONG = {"breaker_failures": 1, "breaker_backoff_s": 600, "breaker_longest_backoff_s": 600}


@pytest.fixture(params=[SHORT])
async def scheduler(redis_url: str, request: pytest.FixtureRequest) -> AsyncIterator[RunningScheduler]:
    async with running_scheduler(redis_url, **request.param) as scheduler:
        yield scheduler


async def until(scheduler: RunningScheduler, condition: str, workers: int = 1) -> None:
    await scheduler.until_metric(workers, "headrace_workers", model=MODEL, state=condition)


async def submit(gateway: FakeGateway, request_id: str) -> tuple[Job, Offer]:
    job, _ = await gateway.submit(request_id)
    offer = await gateway.offers.get()
    assert offer.request_id == request_id
    await gateway.accept(offer, job)
    return job, offer


@pytest.mark.parametrize("scheduler", [LONG], indirect=True)
async def test_a_worker_that_failed_gets_nothing_and_its_next_incarnation_does(
    scheduler: RunningScheduler, gateway: FakeGateway, worker: FakeWorker
) -> None:
    other = FakeWorker(scheduler, "other", max_sequences=4)
    other.grant(4)
    await until(scheduler, "healthy", 2)
    gateway.report(FAILED, worker_incarnation="an older one")
    gateway.report(FAILED, worker_id="nobody")
    gateway.report(FAILED)
    await until(scheduler, "breaker_open")
    for number in range(4):
        _, offer = await submit(gateway, f"r{number}")
        assert (offer.placement.worker_id, offer.placement.watched) == ("other", False)
    async with dial(scheduler.address) as channel:
        fleet = await SchedulerStub(channel).DescribeFleet(DescribeFleetRequest())
    conditions = {one.registration.worker_id: (one.condition, one.healthy) for one in fleet.workers}
    assert conditions["w"] == (FleetWorker.CONDITION_BREAKER_OPEN, False)
    await gateway.submit("r4")
    restarted = FakeWorker(scheduler, incarnation="2")
    restarted.grant(8)
    assert (await gateway.offers.get()).placement.worker_incarnation == "2"
    await other.leave()
    await restarted.leave()


async def test_one_probe_at_a_time_and_its_first_token_lets_the_others_in(
    scheduler: RunningScheduler, gateway: FakeGateway, worker: FakeWorker
) -> None:
    await until(scheduler, "healthy")
    gateway.report(FAILED)
    await until(scheduler, "breaker_half_open")  # all workers of the model have failed: requests wait for the backoff
    waiting, _ = await gateway.submit("first")
    probe = await gateway.offers.get()
    assert probe.placement.probe and probe.placement.watched
    await gateway.submit("second")
    await gateway.accept(probe, waiting)
    await scheduler.until_metric(1, "headrace_offers_total", answer="accepted")
    assert gateway.offers.empty(), "the probe is on its way"
    gateway.report(BEGAN, probe)
    second = await gateway.offers.get()
    assert (second.request_id, second.placement.probe, second.placement.watched) == ("second", False, True)
    gateway.report(FINISHED, second)
    _, third = await submit(gateway, "third")
    assert not third.placement.watched
    await until(scheduler, "healthy")


async def test_a_failed_probe_goes_on_elsewhere_and_is_no_probe_again(
    scheduler: RunningScheduler, gateway: FakeGateway, worker: FakeWorker
) -> None:
    await until(scheduler, "healthy")
    gateway.report(FAILED)
    await until(scheduler, "breaker_half_open")
    job, probe = await submit(gateway, "r")
    assert probe.placement.probe
    other = FakeWorker(scheduler, "other")
    other.grant(1, running=7)  # far less attractive than an idle one
    await until(scheduler, "healthy")
    gateway.report(FAILED, probe)
    await until(scheduler, "breaker_half_open")
    third = FakeWorker(scheduler, "third")
    third.grant(1, running=7)
    await until(scheduler, "healthy", 2)
    lost = Request(job=job, queue_entry_id=probe.queue_entry_id, attempt=2, reason=Request.REASON_WORKER_LOST)
    lost.tried_worker_id = "third"
    gateway.request(lost)
    offer = await gateway.offers.get()
    assert (offer.placement.worker_id, offer.placement.probe) == ("other", False)
    for one in (other, third):
        await one.leave()


@pytest.mark.parametrize("scheduler", [SHORT | {"breaker_probe_timeout_s": 0.2}], indirect=True)
async def test_a_probe_whose_gateway_dies_makes_room_for_the_next(
    scheduler: RunningScheduler, gateway: FakeGateway, worker: FakeWorker, redis_url: str
) -> None:
    await until(scheduler, "healthy")
    gateway.report(FAILED)
    await until(scheduler, "breaker_half_open")
    _, probe = await submit(gateway, "r")
    assert probe.placement.probe
    await gateway.die()
    worker.grant(8, "r")
    other = FakeGateway(redis_url, "other")
    await other.connect(scheduler)
    _, offer = await submit(other, "s")
    assert offer.placement.probe
    await other.close()


async def test_an_offer_that_comes_to_nothing_is_no_probe(
    scheduler: RunningScheduler, gateway: FakeGateway, worker: FakeWorker
) -> None:
    await until(scheduler, "healthy")
    gateway.report(FAILED)
    await until(scheduler, "breaker_half_open")
    for number in range(3):
        await gateway.submit(f"r{number}")
        offer = await gateway.offers.get()
        assert offer.placement.probe
        gateway.answer(offer, OfferAnswer.STATUS_GONE)
    _, offer = await submit(gateway, "last")
    gateway.report(AttemptReport.EVENT_WITHDRAWN, offer)
    assert (await submit(gateway, "next"))[1].placement.probe
