"""Entries that Redis has lost are added again, once, and only for requests that still run."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from headrace.v1.job_pb2 import Job
from headrace.v1.sampling_pb2 import Sampling, Stopping
from services.common.errors import RequestFailed
from services.common.redis.client import RedisClient
from services.common.redis.dead_letters import DeadLetters
from services.common.redis.keys import GROUP, Owner, queue_stream
from services.common.redis.queue import JobQueue
from services.gateway.active_request import ActiveRequest, ActiveRequests
from services.gateway.answers.leases import Leases
from services.gateway.caller import Caller
from services.gateway.catalog import Model
from services.gateway.request import GenerationRequest, unpack_ids
from services.gateway.shedder import ModelLoad
from services.gateway.text.tokenization import ModelTokenizer
from tests.services.gateway.tokenizers_for_tests import bundle

LOST = "1-1"
_OWNERS = "return redis.call('XPENDING', KEYS[1], ARGV[1])"


@dataclass
class Bench:
    """Leases, and one accepted request whose entry is not in Redis."""

    leases: Leases
    queue: JobQueue
    scheduler: JobQueue
    letters: DeadLetters
    requests: ActiveRequests
    active: ActiveRequest
    redis: RedisClient

    async def offer(self, count: int) -> list[ActiveRequest]:
        """Requests whose entries a scheduler holds."""
        offered = []
        for number in range(count):
            job = Job(request_id=f"offered-{number}", model="m")
            active = ActiveRequest(self.active.request, job, ModelLoad(60.0, time.monotonic))
            active.entry_id = await self.queue.enqueue(job)
            self.requests.add(active)
            offered.append(active)
        assert len(await self.scheduler.pop("m", count)) == count
        return offered

    async def owners(self) -> dict[str, int]:
        """How many entries each consumer has."""
        _, _, _, owners = await self.redis.command("EVAL", _OWNERS, 1, queue_stream("m", 0), GROUP)
        return {owner.decode(): int(entries) for owner, entries in owners}

    async def entries(self) -> list[str]:
        await self.leases.wait_ended(10)
        found = await self.redis.command("XRANGE", queue_stream("m", 0), "-", "+")
        return [entry_id.decode() for entry_id, _fields in found]


@pytest.fixture
async def bench(redis_url: str) -> AsyncIterator[Bench]:
    queue = JobQueue(redis_url, Owner("gateway", "g", "1"))
    scheduler = JobQueue(redis_url, Owner("scheduler", "s", "1"))
    redis = RedisClient(redis_url)
    requests = ActiveRequests()
    model = Model("m", 8, 9, 4, ModelTokenizer(bundle()), 0, "fp")
    request = GenerationRequest(Caller("r", "r", 0.0, 1.0), model, [1], Sampling(), Stopping())
    active = ActiveRequest(request, Job(request_id="r", model="m"), ModelLoad(60.0, time.monotonic))
    active.entry_id, active.owns_entry = LOST, True
    requests.add(active)
    letters = DeadLetters(redis)
    leases = Leases(queue, letters, requests, allow_volatile=True)
    yield Bench(leases, queue, scheduler, letters, requests, active, redis)
    await queue.close()
    await scheduler.close()
    await redis.close()


async def test_a_lost_entry_is_added_again(bench: Bench) -> None:
    await bench.leases.add_again(bench.active, LOST)
    assert await bench.entries() == [bench.active.entry_id]
    assert not bench.active.owns_entry


async def test_who_finds_it_lost_twice_adds_it_once(bench: Bench) -> None:
    await asyncio.gather(*(bench.leases.add_again(bench.active, LOST) for _ in range(3)))
    await bench.leases.add_again(bench.active, LOST)
    assert await bench.entries() == [bench.active.entry_id]


async def test_entries_that_were_offered_are_taken_over_together(bench: Bench) -> None:
    popped = await bench.offer(100)
    for active in popped:
        bench.leases.take_over(active)
    while (await bench.owners()) != {"g:g:1": 100}:  # noqa: ASYNC110 - another client of Redis does it
        await asyncio.sleep(0.01)
    assert all(active.owns_entry for active in popped)


async def test_an_offered_entry_that_is_lost_meanwhile_is_added_again(bench: Bench) -> None:
    bench.active.owns_entry = False
    bench.leases.take_over(bench.active)
    while bench.active.entry_id == LOST:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await bench.entries() == [bench.active.entry_id]


async def test_the_entry_of_a_request_that_has_ended_is_not_taken_over(bench: Bench) -> None:
    [ended, running] = await bench.offer(2)
    bench.leases.take_over(ended)
    bench.requests.remove(ended)
    bench.leases.take_over(running)
    while "g:g:1" not in await bench.owners():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await bench.owners() == {"g:g:1": 1, "s:s:1": 1}


async def test_an_ended_request_leaves_nothing_behind(bench: Bench) -> None:
    adding = asyncio.create_task(bench.leases.add_again(bench.active, LOST))
    await asyncio.sleep(0)  # it waits for Redis now
    bench.requests.remove(bench.active)
    await adding
    assert await bench.entries() == []
    await bench.leases.add_again(bench.active, LOST)
    assert await bench.entries() == []


async def test_a_request_that_was_given_up_is_kept_before_its_entry_ends(bench: Bench) -> None:
    await bench.leases.add_again(bench.active, LOST)
    bench.active.failures, bench.active.given_up = 3, True
    bench.active.fail(RequestFailed("It failed on 3 workers."))
    bench.leases.acknowledge(bench.active)
    assert await bench.entries() == []
    [letter] = await bench.letters.all()
    assert (letter.reason, letter.failures) == ("It failed on 3 workers.", 3)
    assert unpack_ids(letter.request.prompt_ids) == [1]
