"""64 callers over three gateways hammer one key, or those of a group, with ten times what they may take: limits hold to
the last token.
"""

import asyncio
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.flows.hammer import CLIENTS, Call, Hammer, most_at_once, taken_and_asked, within
from tests.flows.headrace_up import HeadraceUp, eventually
from tests.flows.keyed_stack import MODEL, KeyedStack

pytestmark = pytest.mark.timeout(300)  # a killed gateway holds what it reserved for 15 s

GATEWAYS = 3
KEYS_OF_A_GROUP = 3
# With these 64 callers are never too many: each refusal is that of a limit.
UNSHED = ("--priority", "high")
LONGEST_WAIT_S = 3600
PROMPT = [1000, 2000, 3000]
MINUTE_S = 60.0
DAY_S = 24 * 60 * MINUTE_S
# Millionths per token.
PRICES = '["*"]\nprompt = 1\ncompletion = 2\n'
# What a call of `some_tokens` takes in the mean, in tokens and in thousandths of money.
MEAN_TOKENS = 9
MEAN_MONEY = 2 * MEAN_TOKENS - len(PROMPT)


def some_tokens(draw: random.Random) -> dict[str, Any]:
    """Each second one ends well before the tokens that it has reserved."""
    most = draw.randint(1, 20)
    stop_token_ids = [PROMPT[1]] if draw.random() < 0.5 else []
    return _body(max_tokens=most, stop_token_ids=stop_token_ids)


def few_tokens(_: random.Random) -> dict[str, Any]:
    return _body(max_tokens=2)


def long_ones(_: random.Random) -> dict[str, Any]:
    return _body(max_tokens=60)


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": PROMPT, "ignore_eos": True, **fields}


def tokens(call: Call) -> int:
    return call.tokens


def one(call: Call) -> int:
    return int(call.first is not None)


def money(call: Call) -> int:
    """In thousandths, which is what PRICES make of a token."""
    return call.prompt_tokens + 2 * call.completion_tokens


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[KeyedStack]:
    folder = tmp_path_factory.mktemp("hammer")
    prices = folder / "prices.toml"
    prices.write_text(PRICES)
    settings = {
        "HEADRACE_GATEWAY_PRICES": str(prices),
        "HEADRACE_GATEWAY_MAX_WAIT_S": str(LONGEST_WAIT_S),
        "HEADRACE_WORKER_ECHO_STEP_MS": "5",
    }
    up = HeadraceUp(folder, "--engine", "echo", "--gateways", str(GATEWAYS), settings=settings)
    try:
        up.wait_ready()
        yield KeyedStack(up)
    finally:
        up.kill()


@dataclass(frozen=True)
class Kind:
    """A kind of limit: what it counts, and the calls that it is hammered with."""

    body: Callable[[random.Random], dict[str, Any]]
    # What such a call takes in the mean.
    mean: float
    amount: Callable[[Call], int]
    window_s: float
    # Amounts are in so many parts of what the limit is told in.
    parts: int = 1


KINDS = {
    "requests_per_minute": Kind(few_tokens, 1, one, MINUTE_S),
    "tokens_per_minute": Kind(some_tokens, MEAN_TOKENS, tokens, MINUTE_S),
    "tokens_per_day": Kind(some_tokens, MEAN_TOKENS, tokens, DAY_S),
    "money_per_month": Kind(some_tokens, MEAN_MONEY, money, 31 * DAY_S, parts=1000),
    "concurrent": Kind(long_ones, 1, one, 0),
}


class Limited:
    """A key with one limit. `meter`: its name, as in `requests_per_minute`."""

    def __init__(self, stack: KeyedStack, name: str, meter: str, limit: int, *options: str) -> None:
        self.stack = stack
        self.name = name
        self.kind = KINDS[meter]
        self.limit = limit
        self._meter = meter
        self.keys = self._make(f"--{meter.replace('_', '-')}", str(limit // self.kind.parts), *options)

    def hammer(self, *keys: str) -> Hammer:
        """With other keys beside its own."""
        urls = [self.stack.base_url(number + 1) for number in range(GATEWAYS)]
        return Hammer(urls, [*self.keys, *keys], self.kind.body)

    def ten_times(self) -> int:
        """Calls of each client that ask for ten times the limit."""
        return math.ceil(10 * self.limit / self.kind.mean / CLIENTS)

    def use(self) -> dict[str, Any]:
        use = self.stack.keys("show", self.name)["use"][self._meter]
        assert isinstance(use, dict)
        return use

    def use_at_the_end(self) -> int:
        """What is used once nothing is reserved any more: a killed gateway's leases run out."""
        eventually(lambda: self.use()["held"] == 0, "nothing is left reserved", timeout_s=60)
        return round(self.use()["used"] * self.kind.parts)

    def check_use(self, calls: Sequence[Call]) -> None:
        """What is used in the end is what the callers saw, and in full what a killed gateway left: no more than the
        limit, and nearly all of it, with what has left the window since.
        """
        amount = self.kind.amount
        used = self.use_at_the_end()
        begin = time.monotonic() - self.kind.window_s
        at_most = [call.at_most() for call in calls]
        assert sum(amount(call) for call in calls if call.sent >= begin) <= used <= sum(map(amount, at_most))
        assert used <= self.limit
        assert used + sum(amount(call) for call in at_most if call.sent < begin) >= 0.95 * self.limit

    def check_refusals(self, calls: Sequence[Call]) -> None:
        """Some are refused, and none that would have fitted."""
        limit = Decimal(self.limit) / self.kind.parts
        refusals = [taken_and_asked(call.refusal) for call in calls if call.refusal]
        assert refusals and all(taken <= limit < taken + asked for taken, asked in refusals)

    def _make(self, *options: str) -> list[str]:
        return [self.stack.keys("create", self.name, *UNSHED, *options)["key"]]


class LimitedGroup(Limited):
    """A group of keys with one limit."""

    def __init__(self, stack: KeyedStack, group: str, meter: str, limit: int) -> None:
        self._group = group
        super().__init__(stack, f"{group} 0", meter, limit)
        self._meter = f"group_{meter}"

    def _make(self, *options: str) -> list[str]:
        self.stack.keys("group", self._group, *options)
        names = [f"{self._group} {number}" for number in range(KEYS_OF_A_GROUP)]
        with ThreadPoolExecutor() as pool:
            made = pool.map(lambda name: self.stack.keys("create", name, *UNSHED, "--group", self._group), names)
            return [key["key"] for key in made]


@pytest.mark.parametrize("limited_by", [Limited, LimitedGroup])
@pytest.mark.parametrize(
    ("meter", "limit"),
    [("requests_per_minute", 100), ("tokens_per_minute", 1000), ("tokens_per_day", 1000), ("money_per_month", 2000)],
)
async def test_a_window_takes_its_limit_and_no_token_more(
    stack: KeyedStack, limited_by: type[Limited], meter: str, limit: int
) -> None:
    limited = limited_by(stack, meter, meter, limit)
    calls = await limited.hammer().run(limited.ten_times())
    assert max(within(calls, limited.kind.window_s, limited.kind.amount)) <= limit
    assert sum(map(limited.kind.amount, calls)) >= 0.95 * limit
    assert not any(call.broken for call in calls)
    limited.check_refusals(calls)
    await asyncio.to_thread(limited.check_use, calls)


async def test_a_key_of_a_group_keeps_to_its_own_limit_too(stack: KeyedStack) -> None:
    group = LimitedGroup(stack, "with limits", "tokens_per_day", 1000)
    own = Limited(stack, "with its own", "tokens_per_day", 300, "--group", "with limits")
    first = await own.hammer().run(own.ten_times())
    own.check_refusals(first)
    await asyncio.to_thread(own.check_use, first)
    calls = first + await group.hammer(*own.keys).run(group.ten_times())
    await asyncio.to_thread(group.check_use, calls)
    assert sum(map(tokens, first)) <= await asyncio.to_thread(own.use_at_the_end) <= 300


@pytest.mark.parametrize(("limited_by", "each"), [(Limited, 20), (LimitedGroup, 10)])
async def test_so_many_at_once_and_no_more(stack: KeyedStack, limited_by: type[Limited], each: int) -> None:
    limited = limited_by(stack, "concurrent", "concurrent", 8)
    calls = await limited.hammer().run(each)
    assert most_at_once(calls) == 8
    limited.check_refusals(calls)
    assert await asyncio.to_thread(limited.use_at_the_end) == 0


@pytest.mark.parametrize(
    ("limited_by", "meter", "limit"),
    [
        (Limited, "requests_per_minute", 300),
        (Limited, "tokens_per_minute", 3000),
        (Limited, "tokens_per_day", 3000),
        (Limited, "money_per_month", 6000),
        (LimitedGroup, "tokens_per_minute", 3000),
    ],
)
async def test_a_gateway_that_is_killed_in_the_middle_spends_nothing_twice(
    stack: KeyedStack, limited_by: type[Limited], meter: str, limit: int
) -> None:
    limited = limited_by(stack, f"killed {meter}", meter, limit)
    calls = await run_and_kill_a_gateway(limited, limited.ten_times())
    assert max(within(calls, limited.kind.window_s, limited.kind.amount)) <= limit
    limited.check_refusals(calls)
    await asyncio.to_thread(limited.check_use, calls)


async def test_what_a_killed_gateway_had_at_once_is_free_again(stack: KeyedStack) -> None:
    limited = Limited(stack, "killed concurrent", "concurrent", 8)
    calls = await run_and_kill_a_gateway(limited, 20)
    assert most_at_once(calls) <= 8
    limited.check_refusals(calls)
    assert await asyncio.to_thread(limited.use_at_the_end) == 0
    assert most_at_once(await limited.hammer().run(5)) == 8


async def run_and_kill_a_gateway(limited: Limited, calls_each: int) -> list[Call]:
    """Kills it in full swing, and returns when it is there again and all calls have come to an end."""
    up, hammer = limited.stack.up, limited.hammer()
    since = up.lines_so_far
    running = asyncio.create_task(hammer.run(calls_each))
    await hammer.in_full_swing.wait()
    os.kill(up.pid_of(f"gateway-{GATEWAYS}"), signal.SIGKILL)
    hammer.note_killed(GATEWAYS - 1)
    calls = await running
    assert {call.gateway for call in calls if call.broken} == {GATEWAYS - 1}
    await asyncio.to_thread(_wait_restarted, up, since)
    return calls


def _wait_restarted(up: HeadraceUp, since: int) -> None:
    up.wait_for_line(rf"^gateway-{GATEWAYS} +ready on", since=since)


def test_the_hammer_counts_what_it_saw() -> None:
    calls: Sequence[Call] = [
        Call(0.0, 1.0, 5.0, completion_tokens=2),
        Call(2.0, 4.0, 9.0, completion_tokens=3),
        Call(3.0, 5.0, 6.0, completion_tokens=5),
        Call(4.0, refusal="no"),
    ]
    assert most_at_once(calls) == 2
    assert list(within(calls, 6.0, tokens)) == [2, 5, 5]
    assert list(within(calls, 7.0, tokens)) == [7, 5, 5]


def test_the_hammer_knows_what_may_have_been_charged() -> None:
    cut = Call(0.0, 1.0, 2.0, broken=True, most=(3, 20), before_the_kill=True)
    assert (cut.at_most().tokens, one(cut.at_most())) == (23, 1)
    assert one(Call(0.0, broken=True, before_the_kill=True).at_most()) == 1
    for call in (Call(0.0, broken=True, most=(3, 20)), Call(0.0, refusal="no", most=(3, 20), before_the_kill=True)):
        assert (call.at_most().tokens, one(call.at_most())) == (0, 0)


def test_the_hammer_reads_refusals() -> None:
    ask = "0.25 money per month: 0.1 are used, 0.12 are held by unfinished requests, and this request may take 0.04; it"
    assert taken_and_asked(f"The limit of this key is {ask} fits.") == (Decimal("0.22"), Decimal("0.04"))
    assert taken_and_asked("8 requests at once: 8 are unfinished, and this is one more; it fits later.") == (8, 1)
