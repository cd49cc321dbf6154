"""A scheduler between real Redis, and gateways and workers on real streams."""

import asyncio
import time
from pathlib import Path

import pytest

from headrace.v1.cache_pb2 import Holder
from headrace.v1.job_pb2 import Job
from headrace.v1.sampling_pb2 import PRIORITY_HIGH, PRIORITY_LOW, PRIORITY_NORMAL
from headrace.v1.scheduler_pb2 import (
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    DescribeFleetRequest,
    KvSource,
    OfferAnswer,
    PlacementRequest,
)
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from services.common.channel import dial
from services.common.redis.client import RedisClient
from services.common.redis.keys import queue_stream
from tests.redis_server import RedisServer
from tests.services.scheduler.fakes import (
    MODEL,
    FakeCache,
    FakeGateway,
    FakeWorker,
    RunningScheduler,
    running_scheduler,
    serving_cache,
)


async def until_queue_is_empty(redis_url: str) -> None:
    redis = RedisClient(redis_url)
    stream = queue_stream(MODEL, PRIORITY_NORMAL)
    while await redis.command("XLEN", stream):  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # Redis tells of no event when an entry is deleted
    await redis.close()


def replacement(job: Job, entry_id: str, **fields: object) -> PlacementRequest:
    return PlacementRequest(job=job, queue_entry_id=entry_id, **fields)  # type: ignore[arg-type]


async def test_a_job_is_offered_taken_over_and_acknowledged(
    scheduler: RunningScheduler, gateway: FakeGateway, worker: FakeWorker, redis_url: str
) -> None:
    job, entry_id = await gateway.submit()
    offer = await gateway.offers.get()
    assert (offer.request_id, offer.attempt, offer.queue_entry_id) == (job.request_id, 1, entry_id)
    placement = offer.placement
    assert (placement.worker_id, placement.worker_incarnation, placement.worker_address) == ("w", "1", "w:1")
    assert placement.scheduler_id == scheduler.settings.id
    assert offer.HasField("queue_us") and min(offer.queue_us, offer.placement_us) >= 0
    await gateway.accept(offer, job)
    await gateway.finish(job)
    await until_queue_is_empty(redis_url)
    await scheduler.until_metric(1, "headrace_offers_total", answer="accepted")
    await scheduler.until_metric(1, "headrace_queue_wait_seconds_count", model=MODEL)
    assert scheduler.metric("headrace_placements_total", model=MODEL, reason="least_loaded") == 1


async def test_jobs_wait_in_redis_until_there_are_credits_and_come_by_priority(
    scheduler: RunningScheduler, gateway: FakeGateway
) -> None:
    worker = FakeWorker(scheduler)
    worker.grant(0, running=8)
    for priority in (PRIORITY_LOW, PRIORITY_NORMAL, PRIORITY_HIGH):
        await gateway.submit(f"p{priority}", priority=priority)
    assert [depth.jobs for depth in (await gateway.queue.depths(MODEL)).values()] == [1, 1, 1]
    assert gateway.offers.empty()
    for expected in ("p1", "p2", "p3"):
        worker.grant(1, running=7)
        offer = await gateway.offers.get()
        assert offer.request_id == expected
        await gateway.accept(offer, gateway.job(expected, priority=int(expected[1])))
        worker.grant(0, expected, running=8)
    await worker.leave()


async def test_no_more_is_placed_than_was_granted(scheduler: RunningScheduler, gateway: FakeGateway) -> None:
    worker = FakeWorker(scheduler)
    worker.grant(3)
    for number in range(10):
        await gateway.submit(f"r{number}")
    offers = [await gateway.offers.get() for _ in range(3)]
    for offer in offers:
        await gateway.accept(offer, gateway.job(offer.request_id))
    worker.grant(2, "r0", running=1)  # of its three placements it has seen one
    worker.grant(0, "r1", "r2", running=3)
    worker.grant(1, running=2)
    assert (await gateway.offers.get()).request_id == "r3"
    assert gateway.offers.empty()
    await worker.leave()


async def test_an_answer_that_the_job_runs_frees_its_credit(scheduler: RunningScheduler, gateway: FakeGateway) -> None:
    worker = FakeWorker(scheduler)
    worker.grant(1)
    await gateway.submit("r0")
    await gateway.submit("r1")
    gateway.answer(await gateway.offers.get(), OfferAnswer.STATUS_RUNNING)
    assert (await gateway.offers.get()).request_id == "r1"
    await worker.leave()


async def test_a_gone_job_is_removed_and_frees_its_credit(
    scheduler: RunningScheduler, gateway: FakeGateway, redis_url: str
) -> None:
    worker = FakeWorker(scheduler)
    worker.grant(1)
    await gateway.submit("r0")
    await gateway.submit("r1")
    for _ in range(2):
        gateway.answer(await gateway.offers.get(), OfferAnswer.STATUS_GONE)
    await until_queue_is_empty(redis_url)
    await worker.leave()


async def test_a_deadline_is_the_gateways_affair(gateway: FakeGateway, worker: FakeWorker, redis_url: str) -> None:
    """By this machine's clock it has passed; by the gateway's it may not have."""
    await gateway.submit("late", deadline_unix_ms=int(time.time() * 1000) - 1)
    gateway.answer(await gateway.offers.get(), OfferAnswer.STATUS_GONE)
    await until_queue_is_empty(redis_url)


async def test_a_job_larger_than_every_share_gets_what_other_schedulers_leave(
    scheduler: RunningScheduler, gateway: FakeGateway
) -> None:
    worker = FakeWorker(scheduler)
    worker.grant(2, running=4, free_blocks=100)  # another scheduler has as much of the four that are free
    await gateway.submit("wide", choices=4)
    assert (await gateway.offers.get()).request_id == "wide"
    await worker.leave()


async def test_an_offer_without_an_answer_is_made_again(
    scheduler: RunningScheduler, gateway: FakeGateway, worker: FakeWorker
) -> None:
    job, entry_id = await gateway.submit()
    await gateway.offers.get()
    again = await gateway.offers.get()
    assert (again.request_id, again.queue_entry_id) == (job.request_id, entry_id)
    assert scheduler.metric("headrace_offers_total", answer="none") == 1
    await gateway.accept(again, job)


async def test_a_busy_worker_is_not_tried_again_before_it_reports(
    scheduler: RunningScheduler, gateway: FakeGateway, worker: FakeWorker
) -> None:
    job, entry_id = await gateway.submit("r0")
    await gateway.accept(await gateway.offers.get(), job)
    busy = PlacementRequest.REASON_BUSY
    gateway.request(replacement(job, entry_id, attempt=1, reason=busy, tried_worker_id="w"))
    other = FakeWorker(scheduler, "other")
    other.grant(1)
    offer = await gateway.offers.get()
    assert (offer.request_id, offer.attempt, offer.placement.worker_id) == ("r0", 1, "other")
    await gateway.accept(offer, job)
    await other.leave()

    gateway.request(replacement(job, entry_id, attempt=1, reason=busy, tried_worker_id="w"))
    while not await _held_jobs(scheduler):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    worker.grant(8, "r0")
    assert (await gateway.offers.get()).placement.worker_id == "w"
    assert scheduler.metric("headrace_placements_total", model=MODEL, reason="replaced") == 2


async def test_replacements_come_before_the_queue_and_busy_ones_at_their_rank(
    scheduler: RunningScheduler, gateway: FakeGateway
) -> None:
    worker = FakeWorker(scheduler)
    worker.grant(1)
    old, old_entry = await gateway.submit("old")
    await gateway.accept(await gateway.offers.get(), old)
    worker.grant(0, "old", running=8)
    lost = gateway.job("lost", priority=PRIORITY_LOW)
    gateway.request(replacement(old, old_entry, attempt=1, reason=PlacementRequest.REASON_BUSY))
    gateway.request(replacement(lost, "99999999999999-0", attempt=2, reason=PlacementRequest.REASON_WORKER_LOST))
    await gateway.submit("new")
    while await _held_jobs(scheduler) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for expected in ("lost/2", "old/1", "new/1"):
        worker.grant(1, running=7)
        offer = await gateway.offers.get()
        assert f"{offer.request_id}/{offer.attempt}" == expected
        gateway.answer(offer, OfferAnswer.STATUS_ACCEPTED)
        worker.grant(0, expected, running=8)
    await worker.leave()


async def test_a_replacement_waits_for_a_worker_to_come_back_and_is_refused_in_the_end(
    redis_url: str,
) -> None:
    async with running_scheduler(redis_url, replacement_patience_s=0.3) as scheduler:
        gateway = FakeGateway(redis_url)
        await gateway.connect(scheduler)
        job = gateway.job("r0")
        request = replacement(job, "1-0", attempt=2, reason=PlacementRequest.REASON_WORKER_LOST, tried_worker_id="w")
        gateway.request(request)
        refusal = await gateway.refusals.get()
        assert (refusal.request_id, refusal.attempt, refusal.permanent) == ("r0", 2, False)
        gateway.request(request)
        worker = FakeWorker(scheduler, incarnation="2")
        worker.grant(1)
        offer = await gateway.offers.get()
        assert (offer.attempt, offer.placement.worker_incarnation) == (2, "2")
        await worker.leave()
        await gateway.close()


async def test_jobs_that_are_to_be_alone_share_one_worker_and_the_others_the_rest(
    scheduler: RunningScheduler, gateway: FakeGateway
) -> None:
    a, b = FakeWorker(scheduler, "a"), FakeWorker(scheduler, "b")
    a.grant(6, running=2)
    b.grant(7, running=1)
    await scheduler.until_granted("a", 6)
    await scheduler.until_granted("b", 7)
    for number in range(20):  # more than there is room
        await _ask_to_be_alone(gateway, f"alone{number}")
    while await _held_jobs(scheduler) < 20:  # noqa: ASYNC110
        await asyncio.sleep(0.01)

    await _others_are_placed(gateway, b, "before")
    a.grant(7, running=1)
    await _others_are_placed(gateway, b, "draining")
    a.grant(8)  # it is idle
    for number in range(3):
        offer = await gateway.offers.get()
        assert (offer.request_id, offer.placement.worker_id) == (f"alone{number}", "a")
        gateway.answer(offer, OfferAnswer.STATUS_ACCEPTED)
        await _others_are_placed(gateway, b, f"offered{number}")
        a.grant(0, f"alone{number}/3", running=1)
        await _others_are_placed(gateway, b, f"running{number}")
        a.grant(8)
    await a.leave()
    await b.leave()


async def test_whoever_waits_to_be_alone_on_the_only_worker_is_next(
    scheduler: RunningScheduler, gateway: FakeGateway
) -> None:
    worker = FakeWorker(scheduler)
    worker.grant(6, running=2)
    await scheduler.until_granted("w", 6)
    await _ask_to_be_alone(gateway, "alone")
    while not await _held_jobs(scheduler):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await gateway.submit("other")
    worker.grant(7, running=1)
    await scheduler.until_granted("w", 7)
    assert gateway.offers.empty()
    for expected, sequences in (("alone/3", 0), ("other/1", 7)):
        worker.grant(8)
        offer = await gateway.offers.get()
        assert f"{offer.request_id}/{offer.attempt}" == expected
        gateway.answer(offer, OfferAnswer.STATUS_ACCEPTED)
        worker.grant(sequences, expected, running=1)
        await scheduler.until_granted("w", sequences)
        assert gateway.offers.empty()
    await worker.leave()


async def test_a_job_that_no_worker_could_ever_run_is_refused(
    gateway: FakeGateway, worker: FakeWorker, redis_url: str
) -> None:
    await gateway.submit("wide", choices=9)
    refusal = await gateway.refusals.get()
    assert (refusal.request_id, refusal.attempt, refusal.permanent) == ("wide", 1, True)
    assert "9 choices" in refusal.reason
    await until_queue_is_empty(redis_url)


async def test_what_fits_a_worker_that_has_just_left_may_be_asked_again(
    scheduler: RunningScheduler, gateway: FakeGateway, worker: FakeWorker
) -> None:
    large = FakeWorker(scheduler, "large", max_sequences=16)
    large.grant(16)
    await scheduler.until_granted("w", 8)
    await scheduler.until_granted("large", 16)
    await large.leave()
    await scheduler.until_left("large")
    for choices, permanent in ((9, False), (17, True)):
        await gateway.submit(choices=choices)
        refusal = await gateway.refusals.get()
        assert (f"{choices} choices" in refusal.reason, refusal.permanent) == (True, permanent)


async def test_what_ran_elsewhere_is_no_mistake_of_its_caller(gateway: FakeGateway, worker: FakeWorker) -> None:
    wide = gateway.job("wide", choices=9)
    gateway.request(replacement(wide, "1-0", attempt=2, reason=PlacementRequest.REASON_WORKER_LOST))
    refusal = await gateway.refusals.get()
    assert (refusal.request_id, refusal.permanent) == ("wide", False)


async def test_another_scheduler_places_what_a_dead_one_had_popped(gateway: FakeGateway, redis_url: str) -> None:
    first = RunningScheduler(redis_url)
    await first.ready()
    stranger = FakeGateway(redis_url, "stranger")  # not connected to the first, which therefore sits on the job
    worker = FakeWorker(first)
    worker.grant(1)
    job, entry_id = await stranger.submit()
    while not await _held_jobs(first):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await worker.leave()
    await first.die()
    async with running_scheduler(redis_url) as second:
        await stranger.connect(second)
        worker = FakeWorker(second)
        worker.grant(1)
        offer = await stranger.offers.get()
        assert offer.queue_entry_id == entry_id
        await stranger.accept(offer, job)
        await worker.leave()
    await stranger.close()


async def test_a_dead_gateways_jobs_are_closed_and_counted(
    scheduler: RunningScheduler, gateway: FakeGateway, worker: FakeWorker, redis_url: str
) -> None:
    dying = FakeGateway(redis_url, "dying")
    await dying.connect(scheduler)
    running, _ = await dying.submit("running")
    await dying.accept(await dying.offers.get(), running)
    await dying.submit("offered")
    await dying.offers.get()
    await dying.die()
    await dying.submit("queued")
    await until_queue_is_empty(redis_url)
    while scheduler.metric("headrace_gateway_lost_total") < 3:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await dying.queue.close()
    job, _ = await gateway.submit("alive")
    await gateway.accept(await gateway.offers.get(), job)


async def test_a_dead_gateways_recorded_job_is_offered_to_others_until_one_takes_it(
    scheduler: RunningScheduler, gateway: FakeGateway, worker: FakeWorker, redis_url: str
) -> None:
    dying = FakeGateway(redis_url, "dying")
    await dying.connect(scheduler)
    running, entry_id = await dying.submit("running", answer_id="x")
    await dying.accept(await dying.offers.get(), running)
    await dying.die()
    await dying.queue.close()
    for _ in range(2):  # not taken the first time
        adoption = await gateway.adoptions.get()
        assert (adoption.job, adoption.queue_entry_id) == (running, entry_id)
    await gateway.adopt(adoption)
    gateway.request(replacement(running, entry_id, attempt=2, reason=PlacementRequest.REASON_WORKER_LOST))
    await gateway.disconnect()  # its job still names the dead one
    assert scheduler.metric("headrace_gateway_lost_total") == 0
    await gateway.finish(running)
    await until_queue_is_empty(redis_url)


async def test_a_job_waits_for_its_gateway_to_come_back(
    scheduler: RunningScheduler, gateway: FakeGateway, worker: FakeWorker
) -> None:
    await gateway.disconnect()
    job, _ = await gateway.submit()
    while not await _held_jobs(scheduler):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await gateway.connect(scheduler)
    await gateway.accept(await gateway.offers.get(), job)


async def test_catalogs_follow_the_workers(scheduler: RunningScheduler, gateway: FakeGateway) -> None:
    worker = FakeWorker(scheduler)
    catalog = await gateway.catalogs.get()
    assert [(e.model.name, list(e.worker_addresses)) for e in catalog.entries] == [(MODEL, ["w:1"])]
    await worker.leave()
    assert not (await gateway.catalogs.get()).entries


async def test_a_prefix_hit_decides_between_workers(redis_url: str) -> None:
    blocks = [bytes([number]) * 16 for number in range(4)]
    cache = FakeCache()
    cache.snapshot("e", *blocks, holder="b")
    async with serving_cache(cache) as address, running_scheduler(redis_url, caches=(address,)) as scheduler:
        gateway = FakeGateway(redis_url)
        await gateway.connect(scheduler)
        workers = [FakeWorker(scheduler, id) for id in "abc"]
        for worker in workers:
            worker.grant(8)
        while scheduler.metric("headrace_workers", model=MODEL, state="healthy") != 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        while scheduler.metric("headrace_index_blocks") != 4:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for sequences in (9, 10, 11):
            job, _ = await gateway.submit(prompt_tokens=80, block_hashes=b"".join(blocks))
            offer = await gateway.offers.get()
            assert (offer.placement.worker_id, offer.placement.expected_hit_tokens) == ("b", 64)
            await gateway.accept(offer, job)
            workers[1].grant(sequences, job.request_id)
            await scheduler.until_granted("b", sequences)  # until then the job counts against it
        assert scheduler.metric("headrace_placements_total", model=MODEL, reason="prefix_hit") == 3
        for worker in workers:
            await worker.leave()
        await gateway.close()


async def test_an_offer_names_where_the_prompts_kv_can_come_from(redis_url: str) -> None:
    blocks = [bytes([number]) * 16 for number in range(1, 5)]
    cache = FakeCache()
    cache.snapshot("e", *blocks, holder="cache/f", address="cache:1", kind=Holder.KIND_CACHE)
    async with serving_cache(cache) as address, running_scheduler(redis_url, caches=(address,)) as scheduler:
        gateway = FakeGateway(redis_url)
        await gateway.connect(scheduler)
        worker = FakeWorker(scheduler)
        worker.grant(8)
        await scheduler.until_metric(4, "headrace_index_blocks")
        await gateway.submit(prompt_tokens=80, block_hashes=b"".join(blocks))
        [source] = (await gateway.offers.get()).placement.kv_sources
        assert (source.kind, source.address, source.blocks) == (KvSource.KIND_CACHE, "cache:1", 4)
        assert source.digests == b"".join(blocks), "this cache gives each block's name as its digest"
        await worker.leave()
        await gateway.close()


async def test_a_long_prompt_is_charged_to_the_prefill_worker_until_it_says_so(
    scheduler: RunningScheduler, gateway: FakeGateway
) -> None:
    decode = FakeWorker(scheduler, "d", role=WORKER_ROLE_DECODE)
    prefill = FakeWorker(scheduler, "p", role=WORKER_ROLE_PREFILL)
    decode.grant(8)
    prefill.grant(1)
    await scheduler.until_metric(2, "headrace_workers", model=MODEL, state="healthy")
    sources = []
    for _ in range(2):
        job, _ = await gateway.submit(prompt_tokens=800)
        offer = await gateway.offers.get()
        assert offer.placement.worker_id == "d"
        sources.append([(source.kind, source.address, source.blocks) for source in offer.placement.kv_sources])
        await gateway.accept(offer, job)
    assert sources == [[(KvSource.KIND_PREFILL, "p:1", 49)], []], "it has credit for one"
    prefill.grant(1, "r0")
    decode.grant(8, "r0", "r1")
    await decode.leave()
    await prefill.leave()


async def test_redis_may_crash_and_come_back(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    async with running_scheduler(redis.url) as scheduler:
        worker = FakeWorker(scheduler)
        worker.grant(1)
        gateway = FakeGateway(redis.url)
        await gateway.connect(scheduler)
        running, running_entry = await gateway.submit("running")
        await gateway.accept(await gateway.offers.get(), running)
        waiting, _ = await gateway.submit("waiting")
        await gateway.pause()
        redis.kill()

        other = FakeWorker(scheduler, "other")
        other.grant(1)
        lost = PlacementRequest.REASON_WORKER_LOST
        gateway.request(replacement(running, running_entry, attempt=2, reason=lost, tried_worker_id="w"))
        offer = await gateway.offers.get()
        assert (offer.request_id, offer.placement.worker_id) == ("running", "other")
        gateway.answer(offer, OfferAnswer.STATUS_ACCEPTED)

        redis.start()
        gateway.resume()
        worker.grant(1, "running")
        offer = await gateway.offers.get()
        assert offer.request_id == "waiting"
        await gateway.accept(offer, waiting)
        for fake in (worker, other):
            await fake.leave()
        await gateway.close()
    redis.kill()


async def test_readiness_waits_for_redis(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    redis.kill()
    scheduler = RunningScheduler(redis.url)
    gateway = FakeGateway(redis.url)
    await gateway.pause()
    await gateway.connect(scheduler)
    redis.start()
    await scheduler.ready()
    await gateway.close()
    await scheduler.terminate()
    redis.kill()


async def test_draining_gives_up_what_is_not_offered_and_hears_answers_out(
    scheduler: RunningScheduler, gateway: FakeGateway, redis_url: str
) -> None:
    draining = RunningScheduler(redis_url, lease_s=30)
    await draining.ready()
    worker = FakeWorker(draining)
    await gateway.connect(draining)
    worker.grant(2)
    offered, _ = await gateway.submit("offered")
    stranger = FakeGateway(redis_url, "stranger")
    parked, parked_entry = await stranger.submit("parked")
    offer = await gateway.offers.get()
    while await _held_jobs(draining) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    draining.stop.set()
    await gateway.accept(offer, offered)
    await draining.task
    assert draining.metric("headrace_offers_total", answer="accepted") == 1

    await stranger.connect(scheduler)
    here = FakeWorker(scheduler)
    here.grant(1)
    again = await stranger.offers.get()
    assert again.queue_entry_id == parked_entry
    await stranger.accept(again, parked)
    await here.leave()
    await stranger.close()


async def test_the_fleet_is_described(scheduler: RunningScheduler, gateway: FakeGateway, worker: FakeWorker) -> None:
    await gateway.submit()
    await gateway.offers.get()
    async with dial(scheduler.address) as channel:
        fleet = await SchedulerStub(channel).DescribeFleet(DescribeFleetRequest())
    assert (fleet.scheduler_id, fleet.connected_gateways, fleet.held_jobs) == (scheduler.settings.id, 1, 1)
    [described] = fleet.workers
    assert (described.registration.worker_id, described.healthy, described.state.credits.sequences) == ("w", True, 8)


@pytest.mark.parametrize("stop_first", [True, False])
async def test_idle_latency(
    scheduler: RunningScheduler, gateway: FakeGateway, worker: FakeWorker, stop_first: bool
) -> None:
    """Prints how long a job takes from enqueue to its offer on an idle stack; with a pause before each, or without."""
    hops = []
    for number in range(40):
        await asyncio.sleep(0.01 if stop_first else 0)
        started = time.perf_counter()
        job, _ = await gateway.submit(f"r{number}")
        offer = await gateway.offers.get()
        hops.append(time.perf_counter() - started)
        await gateway.accept(offer, job)
        worker.grant(8, job.request_id)
        await gateway.finish(job)
    print(f"\nenqueue -> offer: median {sorted(hops)[20] * 1000:.2f} ms, worst {max(hops) * 1000:.2f} ms")


async def _ask_to_be_alone(gateway: FakeGateway, request_id: str) -> None:
    """As a gateway does whose request has lost its second worker."""
    lost = PlacementRequest.REASON_WORKER_LOST
    gateway.request(replacement(gateway.job(request_id, alone=True), "1-0", attempt=3, reason=lost))


async def _others_are_placed(gateway: FakeGateway, worker: FakeWorker, name: str) -> None:
    """Sees jobs placed on this worker, one after the other, and ended."""
    for number in range(3):
        job, _ = await gateway.submit(f"{name}-{number}")
        offer = await gateway.offers.get()
        assert (offer.request_id, offer.placement.worker_id) == (job.request_id, worker.id)
        await gateway.accept(offer, job)
        worker.grant(7, job.request_id, running=1)
        await gateway.finish(job)


async def _held_jobs(scheduler: RunningScheduler) -> int:
    async with dial(scheduler.address) as channel:
        fleet = await SchedulerStub(channel).DescribeFleet(DescribeFleetRequest())
    return int(fleet.held_jobs)
