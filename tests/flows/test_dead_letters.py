"""A request that was given up is shown by the command, runs again, and its answer is fetched."""

import asyncio
import json
import time

import httpx
import pytest

from headrace.v1.answer_pb2 import StoredRequest
from headrace.v1.sampling_pb2 import Sampling, Stopping
from services.common.redis.client import RedisClient
from services.common.redis.dead_letters import DeadLetters
from tests.flows.headrace_up import HeadraceUp

pytestmark = pytest.mark.timeout(120)


async def give_up(redis_url: str, request: StoredRequest) -> None:
    redis = RedisClient(redis_url)
    await DeadLetters(redis).add(request.SerializeToString(), "The request failed on 3 workers.", 3)
    await redis.close()


def test_a_request_that_was_given_up_runs_again(stack: HeadraceUp, http: httpx.Client, model: str) -> None:
    body = {"model": model, "prompt": [1, 2, 3, 4], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    expected = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    request = StoredRequest(
        internal_id="given-up",
        request_id="given-up",
        model=model,
        prompt_ids=b"".join(token.to_bytes(4, "little") for token in (1, 2, 3, 4)),
        sampling=Sampling(temperature=0, seed=1),
        stopping=Stopping(max_tokens=12, ignore_eos=True),
        choices=1,
        deadline_unix_ms=int(time.time() * 1000) - 1000,
    )
    asyncio.run(give_up(stack.state.redis_url, request))
    [letter] = json.loads(stack.run("queue", "dead", "list", "--json"))
    assert (letter["request_id"], letter["failures"], letter["prompt_tokens"]) == ("given-up", 3, 4)
    assert "failed on 3 workers" in stack.run("queue", "dead", "list")
    answer_id = stack.run("queue", "dead", "requeue", letter["id"]).split("/")[-1].strip()
    assert http.get(f"/v1/answers/{answer_id}").json()["choices"][0]["text"] == expected
    assert stack.run("queue", "dead", "list") == "No request was given up.\n"


def test_what_is_dropped_is_forgotten(stack: HeadraceUp) -> None:
    asyncio.run(give_up(stack.state.redis_url, StoredRequest(internal_id="x", model="m")))
    [letter] = json.loads(stack.run("queue", "dead", "list", "--json"))
    stack.run("queue", "dead", "drop", letter["id"])
    assert json.loads(stack.run("queue", "dead", "list", "--json")) == []
