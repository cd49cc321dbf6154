import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from headrace.v1.job_pb2 import Job
from headrace.v1.sampling_pb2 import PRIORITY_HIGH, PRIORITY_LOW, PRIORITY_NORMAL
from services.common.errors import Unavailable
from services.common.redis.client import RedisClient
from services.common.redis.keys import GROUP, Owner, queue_stream, queue_streams
from services.common.redis.queue import Arrivals, JobQueue, QueuedJob
from tests.redis_server import RedisServer

LEASE_S = 5.0
MODEL = "org/smol{1}"

MakeQueue = Callable[[Owner], JobQueue]
GATEWAY = Owner("gateway", "gw", "1")
OTHER_GATEWAY = Owner("gateway", "other", "1")
SCHEDULER = Owner("scheduler", "sched", "1")
OTHER_SCHEDULER = Owner("scheduler", "other", "1")


def job(request_id: str, priority: int = PRIORITY_NORMAL) -> Job:
    return Job(
        request_id=request_id, gateway_id="gw", gateway_incarnation="1", model=MODEL, priority=priority, choices=1
    )


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def make(redis_url: str, clock: Clock) -> AsyncIterator[MakeQueue]:
    queues: list[JobQueue] = []

    def make_queue(owner: Owner) -> JobQueue:
        queues.append(JobQueue(redis_url, owner, lease_s=LEASE_S, clock=clock))
        return queues[-1]

    yield make_queue
    for queue in queues:
        await queue.close()


@pytest.fixture
async def gateway(make: MakeQueue) -> JobQueue:
    queue = make(GATEWAY)
    await queue.renew([])
    return queue


@pytest.fixture
def scheduler(make: MakeQueue) -> JobQueue:
    return make(SCHEDULER)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[RedisClient]:
    client = RedisClient(redis_url)
    yield client
    await client.close()


async def expire_leases(redis: RedisClient, idle_ms: int = int(LEASE_S * 1500)) -> None:
    """Makes every pending entry look as old as that, without waiting."""
    for stream in queue_streams(MODEL):
        if not await redis.command("EXISTS", stream):
            continue
        for entry_id, owner, *_ in await redis.command("EVAL", PENDING, 1, stream, GROUP):
            claim = "return redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'IDLE', ARGV[4], 'JUSTID')"
            await redis.command("EVAL", claim, 1, stream, GROUP, owner, entry_id, idle_ms)


async def took_over(gateway: JobQueue, job: Job, entry_id: str) -> bool:
    return not await gateway.take_over([(job, entry_id)])


PENDING = "return redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1000)"


async def test_a_job_comes_out_as_it_went_in(gateway: JobQueue, scheduler: JobQueue) -> None:
    sent = job("r1")
    sent.block_hashes = bytes(range(256))
    entry_id = await gateway.enqueue(sent)
    [popped] = await scheduler.pop(MODEL, 5)
    assert (popped.entry_id, popped.job) == (entry_id, sent)
    assert await scheduler.pop(MODEL, 5) == []


async def test_pop_takes_by_priority_then_age_and_no_more_than_asked(gateway: JobQueue, scheduler: JobQueue) -> None:
    for number, priority in enumerate((PRIORITY_LOW, PRIORITY_NORMAL, PRIORITY_HIGH, 0, PRIORITY_HIGH)):
        await gateway.enqueue(job(f"r{number}", priority))
    first = await scheduler.pop(MODEL, 3)
    second = await scheduler.pop(MODEL, 3)
    assert [queued.job.request_id for queued in first + second] == ["r2", "r4", "r1", "r3", "r0"]
    assert first + second == sorted(first + second, key=lambda queued: queued.rank)


async def test_a_job_is_handed_to_one_scheduler(gateway: JobQueue, scheduler: JobQueue, make: MakeQueue) -> None:
    for number in range(50):
        await gateway.enqueue(job(f"r{number}"))
    other = make(OTHER_SCHEDULER)
    popped = await asyncio.gather(*(queue.pop(MODEL, 7) for queue in [scheduler, other] * 5))
    ids = [queued.entry_id for jobs in popped for queued in jobs]
    assert len(ids) == len(set(ids)) == 50


async def test_acknowledged_jobs_leave_nothing(gateway: JobQueue, scheduler: JobQueue, redis: RedisClient) -> None:
    entry_id = await gateway.enqueue(job("r1"))
    await scheduler.pop(MODEL, 1)
    assert await took_over(gateway, job("r1"), entry_id)
    for _ in range(2):
        await gateway.acknowledge([(job("r1"), entry_id)])
    stream = queue_stream(MODEL, PRIORITY_NORMAL)
    assert await redis.command("XLEN", stream) == 0
    assert await redis.command("EVAL", PENDING, 1, stream, GROUP) == []


async def test_what_is_no_entry_id_keeps_no_other_entry(gateway: JobQueue, scheduler: JobQueue) -> None:
    entry_id = await gateway.enqueue(job("r2"))
    await gateway.acknowledge([(job("r1"), "no id"), (job("r2"), entry_id)])
    assert await scheduler.pop(MODEL, 1) == []


async def test_a_waiting_job_can_be_withdrawn(gateway: JobQueue, scheduler: JobQueue) -> None:
    entry_id = await gateway.enqueue(job("r1"))
    await gateway.acknowledge([(job("r1"), entry_id)])
    assert await scheduler.pop(MODEL, 1) == []


async def test_only_one_gateway_takes_over(gateway: JobQueue, scheduler: JobQueue, make: MakeQueue) -> None:
    entry_id = await gateway.enqueue(job("r1"))
    other = make(OTHER_GATEWAY)
    assert not await took_over(gateway, job("r1"), entry_id), "nobody offered it yet"
    await scheduler.pop(MODEL, 1)
    assert await took_over(gateway, job("r1"), entry_id)
    assert await took_over(gateway, job("r1"), entry_id), "taking over twice is harmless"
    assert not await took_over(other, job("r1"), entry_id)
    await other.acknowledge([(job("r1"), entry_id)])
    await scheduler.remove([QueuedJob(entry_id, job("r1"))])
    assert await gateway.renew([(job("r1"), entry_id)]) == [], "neither of them could end it"


async def test_renew_names_what_is_lost(gateway: JobQueue, scheduler: JobQueue, make: MakeQueue) -> None:
    entries = [(job(f"r{n}", p), await gateway.enqueue(job(f"r{n}", p))) for n, p in enumerate((1, 2, 2, 3))]
    await scheduler.pop(MODEL, 4)
    for entry in entries:
        assert await took_over(gateway, *entry)
    await gateway.acknowledge([entries[1]])
    assert await gateway.renew(entries) == [entries[1]]
    assert sorted(await scheduler.renew(entries), key=str) == sorted(entries, key=str)


async def test_missing_names_what_redis_does_not_hold(
    gateway: JobQueue, scheduler: JobQueue, redis: RedisClient
) -> None:
    jobs = [job("waiting"), job("low", PRIORITY_LOW), job("handed out", PRIORITY_HIGH), job("ended"), job("forgotten")]
    entries = [(sent, await gateway.enqueue(sent)) for sent in jobs]
    await scheduler.pop(MODEL, 1)
    await gateway.acknowledge([entries[3]])
    await redis.command("XDEL", queue_stream(MODEL, PRIORITY_NORMAL), entries[4][1])
    assert await gateway.missing(entries) == entries[3:]
    assert await gateway.missing([]) == []
    await redis.command("FLUSHALL")
    assert {sent.request_id for sent, _ in await gateway.missing(entries)} == {sent.request_id for sent in jobs}


async def test_an_entry_that_holds_no_job_hurts_no_other(
    gateway: JobQueue, scheduler: JobQueue, redis: RedisClient, caplog: pytest.LogCaptureFixture
) -> None:
    stream = queue_stream(MODEL, PRIORITY_NORMAL)
    await gateway.enqueue(job("before"))
    broken = [
        await redis.command("XADD", stream, "*", "job", b"\xff\xff\xff"),
        await redis.command("XADD", stream, "*", "other field", "x"),
        await redis.command("XADD", stream, "*", "job", job("misplaced", PRIORITY_LOW).SerializeToString()),
    ]
    await gateway.enqueue(job("after"))
    popped = await scheduler.pop(MODEL, 10)
    assert [queued.job.request_id for queued in popped] == ["before", "after"]
    await expire_leases(redis)
    reclaimed, _, closed = await scheduler.reclaim(MODEL)
    assert ([queued.job.request_id for queued in reclaimed], closed) == (["before", "after"], [])
    assert await redis.command("XLEN", stream) == 2
    assert all(entry_id.decode() in caplog.text for entry_id in broken)


async def test_depths_count_what_no_gateway_runs(gateway: JobQueue, scheduler: JobQueue) -> None:
    async def counts() -> dict[int, int]:
        return {priority: depth.jobs for priority, depth in (await scheduler.depths(MODEL)).items()}

    assert await counts() == {1: 0, 2: 0, 3: 0}
    entry_id = await gateway.enqueue(job("r1"))
    await gateway.enqueue(job("r2"))
    await gateway.enqueue(job("r3", PRIORITY_LOW))
    assert await counts() == {1: 0, 2: 2, 3: 1}
    await scheduler.pop(MODEL, 2)
    assert await counts() == {1: 0, 2: 2, 3: 1}
    await took_over(gateway, job("r1"), entry_id)
    assert await counts() == {1: 0, 2: 1, 3: 1}


async def test_the_age_of_a_queue_is_that_of_its_oldest_job_without_a_gateway(
    gateway: JobQueue, scheduler: JobQueue, redis: RedisClient
) -> None:
    now_ms = int((await redis.command("TIME"))[0]) * 1000
    stream = queue_stream(MODEL, PRIORITY_NORMAL)
    for request_id, age_s in (("r1", 50), ("r2", 40), ("r3", 30)):
        entry_id = f"{now_ms - age_s * 1000}-0"
        await redis.command("XADD", stream, entry_id, "job", job(request_id).SerializeToString())

    async def age_s() -> float:
        return (await scheduler.depths(MODEL))[PRIORITY_NORMAL].oldest_s

    assert 50 <= await age_s() < 52, "not popped"
    popped = await scheduler.pop(MODEL, 2)
    assert [queued.waited_us is not None and queued.waited_us >= 40_000_000 for queued in popped] == [True, True]
    assert 50 <= await age_s() < 52, "a scheduler's"
    await took_over(gateway, popped[0].job, popped[0].entry_id)
    assert 40 <= await age_s() < 42
    await took_over(gateway, popped[1].job, popped[1].entry_id)
    assert 30 <= await age_s() < 32


async def test_a_dead_schedulers_jobs_are_reclaimed(
    gateway: JobQueue, scheduler: JobQueue, make: MakeQueue, redis: RedisClient
) -> None:
    await gateway.enqueue(job("r1"))
    await scheduler.pop(MODEL, 1)
    other = make(OTHER_SCHEDULER)
    assert await other.reclaim(MODEL) == ([], [], []), "its lease still runs"
    await expire_leases(redis)
    [reclaimed], _, closed = await other.reclaim(MODEL)
    assert (reclaimed.job.request_id, closed) == ("r1", [])
    assert await scheduler.renew([(reclaimed.job, reclaimed.entry_id)]) == [(reclaimed.job, reclaimed.entry_id)]
    assert await took_over(gateway, reclaimed.job, reclaimed.entry_id)


async def test_reclaim_goes_through_more_than_a_page(
    gateway: JobQueue, scheduler: JobQueue, redis: RedisClient
) -> None:
    await asyncio.gather(*(gateway.enqueue(job(f"r{number}")) for number in range(300)))
    await scheduler.pop(MODEL, 300)
    await expire_leases(redis)
    reclaimed, *_ = await scheduler.reclaim(MODEL)
    assert len({queued.job.request_id for queued in reclaimed}) == 300


async def test_a_lost_gateways_jobs_are_closed_once_redis_has_answered_for_a_lease(
    gateway: JobQueue, scheduler: JobQueue, redis: RedisClient, clock: Clock
) -> None:
    entry_id = await gateway.enqueue(job("running"))
    await gateway.enqueue(job("offered"))
    await scheduler.pop(MODEL, 2)
    await took_over(gateway, job("running"), entry_id)
    await expire_leases(redis)
    await redis.command("DEL", "headrace:gateway:gw:1")
    clock.now = LEASE_S - 0.1
    assert await scheduler.reclaim(MODEL) == ([], [], []), "its next beat may be on the way"
    clock.now = LEASE_S + 0.1
    reclaimed, _, closed = await scheduler.reclaim(MODEL)
    assert reclaimed == []
    assert {gone.job.request_id for gone in closed} == {"running", "offered"}
    assert await redis.command("XLEN", queue_stream(MODEL, PRIORITY_NORMAL)) == 0


async def test_a_lost_gateways_job_whose_answer_is_recorded_is_an_orphan(
    gateway: JobQueue, scheduler: JobQueue, make: MakeQueue, redis: RedisClient, clock: Clock
) -> None:
    recorded = job("running")
    recorded.answer_id = "x"
    entry_id = await gateway.enqueue(recorded)
    await scheduler.pop(MODEL, 1)
    await took_over(gateway, recorded, entry_id)
    await expire_leases(redis)
    await gateway.retire()
    clock.now = LEASE_S + 0.1
    jobs, [orphan], closed = await scheduler.reclaim(MODEL)
    assert (jobs, orphan.entry_id, closed) == ([], entry_id, [])
    assert await scheduler.reclaim(MODEL) == ([], [], []), "whoever is offered it has a lease to take it over"
    heir = make(OTHER_GATEWAY)
    assert await took_over(heir, orphan.job, entry_id)
    await expire_leases(redis)
    await heir.renew([])
    assert await scheduler.reclaim(MODEL) == ([], [], []), "its owner lives, whoever it came from"


async def test_a_gateway_gives_a_job_up(gateway: JobQueue, scheduler: JobQueue, clock: Clock) -> None:
    recorded = job("running")
    recorded.answer_id = "x"
    entry_id = await gateway.enqueue(recorded)
    [queued] = await scheduler.pop(MODEL, 1)
    await took_over(gateway, recorded, entry_id)
    await gateway.release([queued])
    await gateway.retire()
    clock.now = LEASE_S + 0.1
    _, [orphan], _ = await scheduler.reclaim(MODEL)
    assert orphan.entry_id == entry_id


async def test_a_live_gateways_job_is_left_alone_until_it_is_clearly_forgotten(
    gateway: JobQueue, scheduler: JobQueue, redis: RedisClient
) -> None:
    entry_id = await gateway.enqueue(job("r1"))
    await scheduler.pop(MODEL, 1)
    await took_over(gateway, job("r1"), entry_id)
    await expire_leases(redis, idle_ms=int(LEASE_S * 2000))
    await gateway.renew([])
    assert await scheduler.reclaim(MODEL) == ([], [], [])
    await expire_leases(redis, idle_ms=int(LEASE_S * 4000))
    await gateway.renew([])
    [reclaimed], _, closed = await scheduler.reclaim(MODEL)
    assert (reclaimed.entry_id, closed) == (entry_id, [])
    assert await gateway.renew([(job("r1"), entry_id)]) == [], "a gateway that runs it after all keeps it"


async def test_released_jobs_are_reclaimed_at_once(gateway: JobQueue, scheduler: JobQueue, make: MakeQueue) -> None:
    await gateway.enqueue(job("r1"))
    popped = await scheduler.pop(MODEL, 1)
    await scheduler.release(popped)
    assert (await make(OTHER_SCHEDULER).reclaim(MODEL))[0] == popped


async def test_release_spares_what_a_gateway_took_over(gateway: JobQueue, scheduler: JobQueue, make: MakeQueue) -> None:
    entry_id = await gateway.enqueue(job("r1"))
    popped = await scheduler.pop(MODEL, 1)
    await took_over(gateway, job("r1"), entry_id)
    await scheduler.release(popped)
    assert await make(OTHER_SCHEDULER).reclaim(MODEL) == ([], [], [])


@pytest.fixture
async def arrivals(scheduler: JobQueue) -> AsyncIterator[Arrivals]:
    assert await scheduler.pop(MODEL, 10) == []
    arrivals = scheduler.arrivals(MODEL)
    yield arrivals
    await arrivals.close()


@pytest.mark.parametrize("priority", [PRIORITY_LOW, PRIORITY_HIGH])
async def test_a_job_is_handed_over_as_it_comes(
    gateway: JobQueue, scheduler: JobQueue, arrivals: Arrivals, priority: int
) -> None:
    waiting = asyncio.create_task(arrivals.next(2, 10))
    await asyncio.sleep(0.01)
    sent = job("r", priority)
    entry_id = await gateway.enqueue(sent)
    [arrived], more = await waiting
    assert (arrived.entry_id, arrived.job, more) == (entry_id, sent, False)
    assert arrived.waited_us is not None and arrived.waited_us < 5_000_000
    assert await scheduler.renew([(sent, entry_id)]) == [], "it is the scheduler's"


async def test_few_of_many_that_wait_are_taken(gateway: JobQueue, scheduler: JobQueue, arrivals: Arrivals) -> None:
    for number in range(30):
        await gateway.enqueue(job(f"r{number}", (PRIORITY_HIGH, PRIORITY_NORMAL, PRIORITY_LOW)[number % 3]))
    arrived, more = await arrivals.next(2, 10)
    assert more and len(arrived) < 10
    rest = await scheduler.pop(MODEL, 100)
    assert len({queued.job.request_id for queued in [*arrived, *rest]}) == len(arrived) + len(rest) == 30


async def test_what_comes_while_it_is_waited_for_is_all_there_is(
    gateway: JobQueue, scheduler: JobQueue, arrivals: Arrivals
) -> None:
    await scheduler.pop(MODEL, 1)  # which makes the group
    waiting = asyncio.create_task(arrivals.next(1, 10))
    await asyncio.sleep(0.05)  # it is blocked in Redis then
    await gateway.enqueue(job("r"))
    [arrived], more = await waiting
    assert arrived.job.request_id == "r"
    assert arrived.waited_us is not None and more == (arrived.waited_us > 2000), "Redis itself may stand still"


async def test_nothing_arrives_in_the_time(gateway: JobQueue, scheduler: JobQueue, arrivals: Arrivals) -> None:
    await gateway.enqueue(job("r1"))
    await scheduler.pop(MODEL, 10)
    started = time.monotonic()
    assert await arrivals.next(2, 0.05) == ([], False)
    assert time.monotonic() - started >= 0.05


async def test_a_wait_can_be_interrupted_at_any_moment_and_loses_nothing(
    gateway: JobQueue, scheduler: JobQueue
) -> None:
    await scheduler.pop(MODEL, 10)
    for number in range(50):
        arrivals = scheduler.arrivals(MODEL)
        waiting = asyncio.create_task(arrivals.next(2, 10))
        for _ in range(number):
            await asyncio.sleep(0)
        entry_id, _ = await asyncio.gather(gateway.enqueue(job(f"r{number}")), arrivals.interrupt())
        arrived, _ = await waiting
        taken = [*arrived, *await scheduler.pop(MODEL, 10)]
        assert [queued.entry_id for queued in taken] == [entry_id]
        assert await arrivals.next(2, 10) == ([], False)
        await arrivals.close()


async def test_a_group_that_redis_lost_is_looked_for_again(
    redis_server: RedisServer, gateway: JobQueue, scheduler: JobQueue, arrivals: Arrivals
) -> None:
    redis_server.flush()
    assert await arrivals.next(2, 10) == ([], True)
    await scheduler.pop(MODEL, 1)
    waiting = asyncio.create_task(arrivals.next(2, 10))
    await asyncio.sleep(0.01)
    redis_server.flush()
    await gateway.enqueue(job("r1"))  # which an old Redis needs to notice
    assert await waiting == ([], True)
    assert len(await scheduler.pop(MODEL, 10)) == 1


async def test_a_lost_consumer_group_is_made_again(gateway: JobQueue, scheduler: JobQueue, redis: RedisClient) -> None:
    await gateway.enqueue(job("r1"))
    await scheduler.pop(MODEL, 1)
    await redis.command("XGROUP", "DESTROY", queue_stream(MODEL, PRIORITY_NORMAL), GROUP)
    assert await scheduler.reclaim(MODEL) == ([], [], [])
    [again] = await scheduler.pop(MODEL, 1)
    assert again.job.request_id == "r1"


async def test_an_entry_deleted_by_hand_is_forgotten(
    gateway: JobQueue, scheduler: JobQueue, redis: RedisClient
) -> None:
    entry_id = await gateway.enqueue(job("r1"))
    await scheduler.pop(MODEL, 1)
    stream = queue_stream(MODEL, PRIORITY_NORMAL)
    await redis.command("XDEL", stream, entry_id)
    await expire_leases(redis)
    assert await scheduler.reclaim(MODEL) == ([], [], [])
    assert await redis.command("EVAL", PENDING, 1, stream, GROUP) == []


async def test_consumers_of_processes_long_gone_are_forgotten(
    gateway: JobQueue, scheduler: JobQueue, redis: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await gateway.enqueue(job("r1"))
    await scheduler.pop(MODEL, 1)
    stream = queue_stream(MODEL, PRIORITY_NORMAL)
    await redis.command("XGROUP", "CREATECONSUMER", stream, GROUP, "s:old:1")
    monkeypatch.setattr("services.common.redis.queue._FORGET_CONSUMER_MS", -1)
    await scheduler.reclaim(MODEL)
    consumers = await redis.command("EVAL", "return redis.call('XINFO','CONSUMERS',KEYS[1],ARGV[1])", 1, stream, GROUP)
    assert [info[1] for info in consumers] == [SCHEDULER.consumer.encode()]


async def test_jobs_and_owners_outlive_a_crash_of_redis(tmp_path: Path, redis_server: RedisServer) -> None:
    server = RedisServer(tmp_path, binary=redis_server.binary)
    gateway, scheduler = JobQueue(server.url, GATEWAY), JobQueue(server.url, SCHEDULER)
    running = await gateway.enqueue(job("running"))
    await scheduler.pop(MODEL, 1)
    await took_over(gateway, job("running"), running)
    await gateway.enqueue(job("waiting"))
    server.kill()
    with pytest.raises(Unavailable):
        await gateway.enqueue(job("refused"))
    with pytest.raises(Unavailable):
        await scheduler.reclaim(MODEL)
    server.start()
    assert await gateway.renew([(job("running"), running)]) == []
    assert [queued.job.request_id for queued in await scheduler.pop(MODEL, 5)] == ["waiting"]
    for queue in (gateway, scheduler):
        await queue.close()
    server.kill()


async def test_every_script_keeps_to_one_slot_of_a_cluster(tmp_path: Path, redis_server: RedisServer) -> None:
    options = ("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no")
    server = RedisServer(tmp_path, *options, binary=redis_server.binary)
    redis = RedisClient(server.url)
    await redis.command("CLUSTER", "ADDSLOTS", *range(16384))
    # Redis tells of no event when it has settled.
    state = "return redis.call('CLUSTER', 'INFO')"
    while b"cluster_state:ok" not in await redis.command("EVAL", state, 0):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    gateway = JobQueue(server.url, GATEWAY, lease_s=LEASE_S)
    scheduler = JobQueue(server.url, SCHEDULER, lease_s=LEASE_S)
    await gateway.renew([])
    entries = [(job(f"r{n}", n), await gateway.enqueue(job(f"r{n}", n))) for n in (1, 2, 3)]
    popped = await scheduler.pop(MODEL, 4)
    entries.append((job("r4", 3), await gateway.enqueue(job("r4", 3))))
    arrivals = scheduler.arrivals(MODEL)
    popped += (await arrivals.next(2, 1)).jobs
    await scheduler.release(popped)
    assert len((await scheduler.reclaim(MODEL))[0]) == 4
    assert await took_over(gateway, *entries[0])
    assert await gateway.renew(entries) == []
    for entry in entries:
        await gateway.acknowledge([entry])
    assert sum(depth.jobs for depth in (await scheduler.depths(MODEL)).values()) == 0
    for closing in (gateway, scheduler, arrivals, redis):
        await closing.close()
    server.kill()


async def test_cost_of_a_queue_hop(gateway: JobQueue, scheduler: JobQueue, arrivals: Arrivals) -> None:
    """Prints how long a job takes from enqueue to the scheduler on an idle queue, the wake-up included."""
    hops = []
    await scheduler.pop(MODEL, 1)
    for _ in range(50):
        waiting = asyncio.create_task(arrivals.next(2, 5))
        await asyncio.sleep(0.005)  # the wait is to be blocked in Redis before the job comes
        started = time.perf_counter()
        entry_id = await gateway.enqueue(job("r"))
        assert (await waiting).jobs
        hops.append(time.perf_counter() - started)
        await gateway.acknowledge([(job("r"), entry_id)])
    print(f"\nenqueue -> scheduler: median {sorted(hops)[25] * 1000:.2f} ms, worst {max(hops) * 1000:.2f} ms")
