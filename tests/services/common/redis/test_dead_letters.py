from collections.abc import AsyncIterator

import pytest

from headrace.v1.answer_pb2 import StoredRequest
from headrace.v1.sampling_pb2 import Stopping
from services.common.redis.answers import AnswerStore, State
from services.common.redis.client import RedisClient
from services.common.redis.dead_letters import DeadLetters
from services.common.redis.keys import Owner
from services.common.redis.queue import JobQueue

REQUEST = StoredRequest(
    internal_id="r", model="m", prompt_ids=bytes(12), choices=2, stopping=Stopping(max_tokens=5), deterministic=True
)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[RedisClient]:
    client = RedisClient(redis_url)
    yield client
    await client.close()


@pytest.fixture
def letters(redis: RedisClient) -> DeadLetters:
    return DeadLetters(redis)


async def test_letters_are_kept_until_they_are_removed(letters: DeadLetters) -> None:
    assert await letters.all() == []
    await letters.add(REQUEST.SerializeToString(), "It failed.", 3)
    [letter] = await letters.all()
    assert (letter.request, letter.reason, letter.failures) == (REQUEST, "It failed.", 3)
    assert await letters.find(letter.entry_id) == letter
    milliseconds = letter.entry_id.partition("-")[0]
    for other in ("", "nonsense", "-", "+", milliseconds, f"{letter.entry_id}9", f"{'9' * 30}-0"):
        assert await letters.find(other) is None, other
    await letters.remove(letter)
    assert await letters.find(letter.entry_id) is None


async def test_a_requeued_request_waits_for_a_gateway_to_adopt_it(
    letters: DeadLetters, redis: RedisClient, redis_url: str
) -> None:
    await letters.add(REQUEST.SerializeToString(), "It failed.", 3)
    [letter] = await letters.all()
    answer_id = await letters.requeue(letter)
    assert await letters.all() == []
    gateway, scheduler = Owner("gateway", "g", "1"), Owner("scheduler", "s", "1")
    queue, answers = JobQueue(redis_url, scheduler), AnswerStore(redis, gateway, ttl_s=60)
    [queued] = await queue.pop("m", 10)
    assert (queued.job.request_id, queued.job.answer_id, queued.job.deterministic) == ("r", answer_id, True)
    assert (queued.job.prompt_tokens, queued.job.choices, queued.job.max_tokens) == (3, 2, 5)
    assert queued.job.alone, "it may be what killed its workers"
    found = await answers.find(answer_id)
    assert found is not None
    assert found.state is State.OPEN
    assert StoredRequest.FromString(found.request).deadline_unix_ms > REQUEST.deadline_unix_ms
    assert await answers.adopt(answer_id, found.owner)
    await queue.close()
