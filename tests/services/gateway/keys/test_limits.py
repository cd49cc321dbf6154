"""What a key may use, by calls to a real gateway on a real Redis."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import httpx
import pytest

from headrace.v1.inference_pb2 import GenerateRequest
from headrace.v1.sampling_pb2 import Stopping
from services.gateway.http.outlets import EventStream
from services.gateway.request import Delta
from tests.redis_server import RedisServer
from tests.services.gateway.fakes import CONTEXT, MODEL, FakeWorker, says
from tests.services.gateway.keys_for_tests import TestKey, make_key, set_group
from tests.services.gateway.stack import TEXT, Stack, eventually, running_stack
from tests.services.gateway.tokenizers_for_tests import byte_level_tokenizer

PROMPT = [5, 6, 7]
ANSWER = len(byte_level_tokenizer().encode(TEXT).ids) + 1  # with the end-of-sequence token
TOTAL = len(PROMPT) + ANSWER
PRICES = '["org/tiny"]\nprompt = 1\ncached = 0.5\ncompletion = 2\n'


@contextlib.asynccontextmanager
async def streaming(stack: Stack, key: TestKey, **fields: object) -> AsyncIterator[httpx.Response]:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 100, "stream": True, **fields}
    async with stack.http.stream("POST", "/v1/completions", json=body, headers=key.headers) as response:
        yield response


async def test_requests_per_minute(stack: Stack) -> None:
    key = await make_key(stack.redis, requests_per_minute=2)
    answers = [await key.complete(stack) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"2"}
    assert answers[0].headers["x-ratelimit-reset-requests"] == "1m0.5s"
    assert "x-ratelimit-limit-tokens" not in answers[0].headers
    error = answers[2].json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert (
        "The limit of this key is 2 requests per minute: 2 are used, and this is one more; it fits in"
        in error["message"]
    )
    assert 0 < int(answers[2].headers["retry-after"]) == error["retry_after_seconds"] <= 61
    outcomes = [stack.sample("llm_requests_total", model=MODEL, status=status) for status in ("success", "refused")]
    assert (outcomes, stack.sample("llm_requests_total", model=MODEL, status="error")) == ([2, 1], 0)


async def test_tokens_are_reserved_at_their_most_and_charged_as_they_were(stack: Stack) -> None:
    key = await make_key(stack.redis, tokens_per_minute=200)
    stack.workers[0].go.clear()
    running = asyncio.create_task(key.complete(stack, PROMPT, n=1))
    await stack.workers[0].started.wait()
    assert await key.sums() == {"tokens_per_minute": (0, 103)}
    refused = await key.complete(stack, PROMPT)
    assert (refused.status_code, refused.headers["x-ratelimit-remaining-tokens"]) == (429, "97")
    assert refused.json()["error"]["message"] == (
        "The limit of this key is 200 tokens per minute: 0 are used, 103 are held by unfinished requests, and this "
        "request may take 103; it fits when some of these end."
    )
    stack.workers[0].go.set()
    usage = (await running).json()["usage"]
    assert usage["total_tokens"] == TOTAL
    assert await key.settled() == {"tokens_per_minute": (TOTAL, 0)}
    assert (await key.complete(stack, PROMPT)).headers["x-ratelimit-limit-tokens"] == "200"


async def test_a_cancelled_stream_is_charged_what_was_produced(stack: Stack) -> None:
    key = await make_key(stack.redis, tokens_per_minute=500, concurrent=1)
    stack.workers[0].pause_after = 3
    async with streaming(stack, key) as response:
        assert response.headers["x-ratelimit-remaining-tokens"] == str(500 - 103)
        parts = response.aiter_bytes()
        await anext(parts)
        assert (await key.sums())["concurrent"] == (0, 1)
        assert "1 requests at once: 1 are unfinished" in (await key.complete(stack)).text
    sums = await key.settled()
    used, _ = sums["tokens_per_minute"]
    assert len(PROMPT) < used <= len(PROMPT) + 3
    assert sums["concurrent"] == (0, 0)


async def test_what_was_produced_is_charged_though_its_caller_reads_no_more(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = EventStream.send

    async def send_one(stream: EventStream, delta: Delta) -> None:
        if delta.seq:
            await asyncio.get_running_loop().create_future()
        await send(stream, delta)

    monkeypatch.setattr(EventStream, "send", send_one)
    monkeypatch.setattr(EventStream, "open", False)
    key = await make_key(stack.redis, tokens_per_minute=500)
    stack.workers[0].pause_after = 8
    async with streaming(stack, key) as response:
        await anext(response.aiter_bytes())
        (active,) = stack.gateway._active

        async def all_have_come() -> bool:
            return active.usage().completion_tokens == 8

        await eventually(all_have_come)
        assert len(active.choices[0].token_ids) < 8
    assert await key.settled() == {"tokens_per_minute": (len(PROMPT) + 8, 0)}


@pytest.mark.parametrize(("told", "believed"), [(2, 2), (1000, len(PROMPT)), (-1000, 0)])
async def test_no_worker_can_pay_into_a_budget(redis_url: str, tmp_path: Path, told: int, believed: int) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    workers = [FakeWorker("w0", says(TEXT), cached_prompt_tokens=told)]
    async with running_stack(redis_url, workers, prices=tmp_path / "prices.toml") as stack:
        key = await make_key(stack.redis, money_per_month=9)
        usage = (await key.complete(stack, PROMPT)).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == believed
        money = 1000 * (len(PROMPT) - believed) + 500 * believed + 2000 * ANSWER
        assert await key.settled() == {"money_per_month": (money, 0)}


async def test_a_request_that_never_began_is_charged_nothing(stack: Stack) -> None:
    key = await make_key(stack.redis, tokens_per_day=500)
    stack.scheduler.go.clear()
    leaving = asyncio.create_task(key.complete(stack))
    await stack.scheduler.popped.wait()
    leaving.cancel()
    assert await key.settled() == {"tokens_per_day": (0, 0)}
    stack.scheduler.go.set()


async def test_every_choice_and_every_prompt_counts(stack: Stack) -> None:
    key = await make_key(stack.redis, tokens_per_minute=1000, requests_per_minute=3)
    await key.complete(stack, PROMPT, n=2)
    assert await key.settled() == {"requests_per_minute": (1, 0), "tokens_per_minute": (TOTAL + ANSWER, 0)}
    await key.complete(stack, [PROMPT, PROMPT], max_tokens=2)
    used = TOTAL + ANSWER + 2 * (len(PROMPT) + 2)
    assert await key.settled() == {"requests_per_minute": (3, 0), "tokens_per_minute": (used, 0)}


async def test_prompts_that_do_not_all_fit_are_refused_and_cost_no_tokens(stack: Stack) -> None:
    key = await make_key(stack.redis, tokens_per_minute=150)
    assert (await key.complete(stack, [PROMPT, PROMPT])).status_code == 429
    assert (await key.settled())["tokens_per_minute"][0] <= TOTAL


async def test_what_can_never_fit_is_the_callers_mistake(stack: Stack) -> None:
    key = await make_key(stack.redis, tokens_per_minute=50)
    answer = await key.complete(stack, PROMPT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")
    assert "may take 103 tokens, but the limit of this key is 50 tokens per minute" in answer.text
    assert (await key.complete(stack, PROMPT, max_tokens=5)).status_code == 200


async def test_without_a_number_the_operators_default_is_reserved_and_enforced(redis_url: str) -> None:
    async with running_stack(redis_url, default_max_tokens=7) as stack:
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
        free, limited = await make_key(stack.redis, concurrent=9), await make_key(stack.redis, tokens_per_day=500)
        for key, most in ((free, None), (limited, 7)):
            await stack.http.post("/v1/chat/completions", json=chat, headers=key.headers)
            start = stack.workers[0].starts[-1]
            assert start.stopping.max_tokens == (most or CONTEXT - len(start.prompt_ids) // 4)
        await stack.inference.Generate(GenerateRequest(model=MODEL, text="x"), metadata=limited.metadata).read()
        assert stack.workers[0].starts[-1].stopping.max_tokens == 7
        assert (await limited.complete(stack, max_tokens=9)).json()["usage"]["completion_tokens"] == 9


async def test_a_budget_of_tokens_is_a_quota(stack: Stack) -> None:
    key = await make_key(stack.redis, tokens_per_day=TOTAL + 10)
    assert (await key.complete(stack, PROMPT, max_tokens=ANSWER)).status_code == 200
    await key.settled()
    refused = await key.complete(stack, PROMPT, max_tokens=ANSWER)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    assert 80_000 < int(refused.headers["retry-after"]) <= 87_120


async def test_a_budget_of_money(redis_url: str, tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(PRICES)
    worker = FakeWorker("w0", says(TEXT), cached_prompt_tokens=2)
    async with running_stack(redis_url, [worker], prices=prices) as stack:
        key = await make_key(stack.redis, money_per_month="0.25")
        assert (await key.complete(stack, PROMPT)).status_code == 200
        micros = 1 * 1000 + 2 * 500 + ANSWER * 2000
        assert await key.settled() == {"money_per_month": (micros, 0)}
        refused = await key.complete(stack, PROMPT)
        assert refused.json()["error"]["code"] == "insufficient_quota"
        assert f"0.25 money per month: {micros / 1e6:g} are used, and this request may take 0.203" in refused.text


async def test_what_has_no_price_cannot_be_paid_for(stack: Stack) -> None:
    key = await make_key(stack.redis, money_per_month=5)
    assert (await key.complete(stack)).status_code == 403


async def test_keys_of_a_group_share_its_limits(stack: Stack) -> None:
    await set_group(stack.redis, "team", requests_per_minute=3)
    one, two = [await make_key(stack.redis, group="team", requests_per_minute=2) for _ in range(2)]
    codes = [(await key.complete(stack)).status_code for key in (one, one, one, two, two)]
    assert codes == [200, 200, 429, 200, 429]
    assert "of group 'team'" in (await two.complete(stack)).text
    assert (await two.complete(stack)).headers["x-ratelimit-remaining-requests"] == "0"


async def test_limits_over_grpc(stack: Stack) -> None:
    key = await make_key(stack.redis, tokens_per_minute=110)
    request = GenerateRequest(model=MODEL, text="hello", stopping=Stopping(max_tokens=100))
    call = stack.inference.Generate(request, metadata=key.metadata)
    initial = dict(await call.initial_metadata())  # type: ignore[arg-type]
    assert (initial["x-ratelimit-limit-tokens"], "x-ratelimit-limit-requests" in initial) == ("110", False)
    assert 0 <= int(initial["x-ratelimit-remaining-tokens"]) < 10
    assert [delta async for delta in call]
    tokens, _ = (await key.settled())["tokens_per_minute"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stack.inference.Generate(request, metadata=key.metadata).read()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    trailing = dict(caught.value.trailing_metadata() or ())
    assert 0 < int(trailing["retry-after"]) <= 61
    assert (trailing["x-ratelimit-limit-tokens"], trailing["x-ratelimit-remaining-tokens"]) == (
        "110",
        str(110 - tokens),
    )


async def test_a_key_without_limits_asks_nothing_of_redis(stack: Stack) -> None:
    await (await make_key(stack.redis)).complete(stack)
    await stack.settled()
    assert await stack.redis.command("KEYS", "headrace:limits:*") == []


@contextlib.asynccontextmanager
async def three_gateways(redis_url: str, **settings: object) -> AsyncIterator[list[Stack]]:
    """Of one scheduler and one worker."""
    worker = FakeWorker("w0", says(TEXT), tokens_per_step=8)
    async with contextlib.AsyncExitStack() as entered:
        first = await entered.enter_async_context(running_stack(redis_url, [worker], **settings))
        stacks = [first]
        for _ in range(2):
            beside = running_stack(redis_url, [], schedulers=[first.scheduler.address], **settings)
            stacks.append(await entered.enter_async_context(beside))
            await stacks[-1].scheduler.stop_popping()
        yield stacks


@dataclass
class Spent:
    """What callers were given."""

    requests: int = 0
    tokens: int = 0
    micros: int = 0

    def add(self, usage: dict[str, int]) -> None:
        self.tokens += usage["total_tokens"]
        self.micros += 1000 * usage["prompt_tokens"] + 2000 * usage["completion_tokens"]


@pytest.mark.parametrize(
    ("limits", "granted"),
    [
        ({"requests_per_minute": 60}, lambda spent: spent.requests / 60),
        ({"tokens_per_minute": 2_000}, lambda spent: spent.tokens / 2_000),
        ({"tokens_per_day": 2_000}, lambda spent: spent.tokens / 2_000),
        ({"money_per_month": "4"}, lambda spent: spent.micros / 4_000_000),
    ],
)
async def test_64_callers_of_three_gateways_get_a_limit_and_nothing_more(
    redis_url: str, tmp_path: Path, limits: dict[str, object], granted: Callable[[Spent], float]
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(PRICES)
    async with three_gateways(redis_url, prices=prices) as stacks:
        key = await make_key(stacks[0].redis, **limits)
        spent = Spent()

        async def call(number: int) -> None:
            answer = await key.complete(stacks[number % 3], PROMPT, max_tokens=5 + number % 25)
            if answer.status_code == 200:
                spent.requests += 1
                spent.add(answer.json()["usage"])
                assert granted(spent) <= 1
            else:
                assert answer.status_code == 429, answer.text

        async def spent_out() -> bool:
            await asyncio.gather(*(call(number) for number in range(64)))
            return granted(spent) >= 0.95

        await eventually(spent_out)
        await key.settled()


async def test_of_64_callers_of_three_gateways_as_many_run_as_may(redis_url: str) -> None:
    async with three_gateways(redis_url) as stacks:
        key = await make_key(stacks[0].redis, concurrent=8)
        worker = stacks[0].workers[0]
        worker.go.clear()
        calls = [asyncio.create_task(key.complete(stacks[number % 3], PROMPT)) for number in range(64)]

        async def others_refused() -> bool:
            return sum(call.done() and call.result().status_code == 429 for call in calls) == 56

        await eventually(others_refused)
        worker.go.set()
        answers = await asyncio.gather(*calls)
        assert sum(answer.status_code == 200 for answer in answers) == 8
        assert len(worker.starts) == 8
        assert await key.settled() == {"concurrent": (0, 0)}


async def test_what_ends_while_redis_is_away_is_charged_when_it_is_back(
    redis_server: RedisServer, redis_url: str
) -> None:
    async with running_stack(redis_url) as stack:
        key = await make_key(stack.redis, tokens_per_minute=1000)
        stack.workers[0].go.clear()
        running = asyncio.create_task(key.complete(stack, PROMPT))
        await stack.workers[0].started.wait()
        redis_server.kill()
        try:
            stack.workers[0].go.set()
            assert (await running).status_code == 200
            assert (await key.complete(stack, PROMPT)).status_code == 503
        finally:
            redis_server.start()
        assert await key.settled() == {"tokens_per_minute": (TOTAL, 0)}

        async def admitted_again() -> bool:
            return (await key.complete(stack, PROMPT)).status_code == 200

        await eventually(admitted_again)


async def test_what_redis_forgot_is_reserved_again(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.keys.limits._RENEW_EVERY_S", 0.05)
    async with running_stack(redis_url) as stack:
        key = await make_key(stack.redis, tokens_per_minute=1000)
        stack.workers[0].go.clear()
        running = asyncio.create_task(key.complete(stack, PROMPT))
        await stack.workers[0].started.wait()
        await stack.redis.command("DEL", *await stack.redis.command("KEYS", "headrace:limits:*"))

        async def reserved_again() -> bool:
            return await key.sums() == {"tokens_per_minute": (0, 103)}

        await eventually(reserved_again)
        stack.workers[0].go.set()
        await running
        assert await key.settled() == {"tokens_per_minute": (TOTAL, 0)}


async def test_a_gateway_that_shuts_down_leaves_nothing_reserved(redis_url: str) -> None:
    async with running_stack(redis_url, drain_grace_s=0.1) as stack:
        key = await make_key(stack.redis, tokens_per_minute=1000)
        stack.workers[0].pause_after = 2
        async with streaming(stack, key) as response:
            parts = response.aiter_bytes()
            await anext(parts)
            stack.stop.set()
            assert "shut down" in [part async for part in parts][-1].decode()
        await stack.task
        used, held = (await key.sums())["tokens_per_minute"]
        assert (len(PROMPT) < used <= len(PROMPT) + 2, held) == (True, 0)
        stack.workers[0].go.set()
