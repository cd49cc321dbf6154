"""64 callers over three gateways hammer one key with ten times what it may take: limits hold to the last token."""

import asyncio
import math
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.flows.hammer import CLIENTS, Call, Hammer, most_at_once, within
from tests.flows.headrace_up import HeadraceUp, eventually
from tests.flows.keyed_stack import MODEL, KeyedStack

pytestmark = pytest.mark.timeout(300)  # a killed gateway holds what it reserved for 15 s

GATEWAYS = 3
PROMPT = [1000, 2000, 3000]
MINUTE_S = 60.0
# Millionths per token.
PRICES = '["*"]\nprompt = 1\ncompletion = 2\n'
# What a call of `some_tokens` takes in the mean, in tokens and in thousandths of money.
MEAN_TOKENS = 9
MEAN_MONEY = 2 * MEAN_TOKENS - len(PROMPT)


def some_tokens(draw: random.Random) -> dict[str, object]:
    """Each second one ends well before the tokens that it has reserved."""
    most = draw.randint(1, 20)
    stop_token_ids = [PROMPT[1]] if draw.random() < 0.5 else []
    return _body(max_tokens=most, stop_token_ids=stop_token_ids)


def few_tokens(_: random.Random) -> dict[str, object]:
    return _body(max_tokens=2)


def long_ones(_: random.Random) -> dict[str, object]:
    return _body(max_tokens=60)


def _body(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": PROMPT, "ignore_eos": True, **fields}


def tokens(call: Call) -> int:
    return call.tokens


def one(_: Call) -> int:
    return 1


def money(call: Call) -> int:
    """In thousandths, which is what PRICES make of a token."""
    return call.prompt_tokens + 2 * call.completion_tokens


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[KeyedStack]:
    folder = tmp_path_factory.mktemp("hammer")
    prices = folder / "prices.toml"
    prices.write_text(PRICES)
    settings = {"HEADRACE_GATEWAY_PRICES": str(prices), "HEADRACE_WORKER_ECHO_STEP_MS": "5"}
    up = HeadraceUp(folder, "--engine", "echo", "--gateways", str(GATEWAYS), settings=settings)
    try:
        up.wait_ready()
        yield KeyedStack(up)
    finally:
        up.kill()


class Limited:
    """A key with one limit. `meter`: its name, as in `requests_per_minute`."""

    def __init__(self, stack: KeyedStack, name: str, meter: str, limit: int) -> None:
        self.stack = stack
        self.meter = meter
        self.name = name
        self.key = stack.keys("create", name, f"--{meter.replace('_', '-')}", str(limit))["key"]

    def hammer(self, body: Callable[[random.Random], dict[str, object]]) -> Hammer:
        return Hammer([self.stack.base_url(number + 1) for number in range(GATEWAYS)], self.key, body)

    def use(self) -> dict[str, Any]:
        use = self.stack.keys("show", self.name)["use"][self.meter]
        assert isinstance(use, dict)
        return use

    def use_at_the_end(self) -> float:
        """What is used once nothing is reserved any more: a killed gateway's leases run out."""
        eventually(lambda: self.use()["held"] == 0, "nothing is left reserved", timeout_s=60)
        return float(self.use()["used"])


def calls_for(limit: int, mean: float) -> int:
    """Calls of each client that ask for ten times the limit."""
    return math.ceil(10 * limit / mean / CLIENTS)


@pytest.mark.parametrize(
    ("meter", "limit", "body", "mean", "amount", "window_s"),
    [
        ("requests_per_minute", 100, few_tokens, 1, one, MINUTE_S),
        ("tokens_per_minute", 1000, some_tokens, MEAN_TOKENS, tokens, MINUTE_S),
        ("tokens_per_day", 1000, some_tokens, MEAN_TOKENS, tokens, 24 * 60 * MINUTE_S),
    ],
)
async def test_a_window_takes_its_limit_and_no_token_more(
    stack: KeyedStack,
    meter: str,
    limit: int,
    body: Callable[[random.Random], dict[str, object]],
    mean: float,
    amount: Callable[[Call], int],
    window_s: float,
) -> None:
    limited = Limited(stack, meter, meter, limit)
    calls = await limited.hammer(body).run(calls_for(limit, mean))
    assert max(within(calls, window_s, amount)) <= limit
    assert sum(amount(call) for call in calls if call.last) >= 0.95 * limit
    assert any(call.refused for call in calls) and not any(call.broken for call in calls)
    if meter == "tokens_per_day":  # nothing slides out of it meanwhile
        assert await asyncio.to_thread(limited.use_at_the_end) == sum(map(amount, calls))
    else:
        assert await asyncio.to_thread(limited.use_at_the_end) <= limit


async def test_a_budget_is_spent_and_not_overspent(stack: KeyedStack) -> None:
    limited = Limited(stack, "money", "money_per_month", 2)
    calls = await limited.hammer(some_tokens).run(calls_for(2000, MEAN_MONEY))
    spent = sum(map(money, calls))
    assert 0.95 * 2000 <= spent <= 2000
    assert round(await asyncio.to_thread(limited.use_at_the_end) * 1000) == spent


async def test_so_many_at_once_and_no_more(stack: KeyedStack) -> None:
    limited = Limited(stack, "concurrent", "concurrent", 8)
    calls = await limited.hammer(long_ones).run(20)
    assert most_at_once(calls) == 8
    assert await asyncio.to_thread(limited.use_at_the_end) == 0


@pytest.mark.parametrize(
    ("meter", "limit", "body", "each", "amount", "unit"),
    [
        ("requests_per_minute", 300, few_tokens, calls_for(300, 1), one, 1),
        ("tokens_per_minute", 3000, some_tokens, calls_for(3000, MEAN_TOKENS), tokens, 1),
        ("tokens_per_day", 3000, some_tokens, calls_for(3000, MEAN_TOKENS), tokens, 1),
        ("money_per_month", 6, some_tokens, calls_for(6000, MEAN_MONEY), money, 1000),
        ("concurrent", 8, long_ones, 20, None, 1),
    ],
)
async def test_a_gateway_that_is_killed_in_the_middle_spends_nothing_twice(
    stack: KeyedStack,
    meter: str,
    limit: int,
    body: Callable[[random.Random], dict[str, object]],
    each: int,
    amount: Callable[[Call], int] | None,
    unit: int,
) -> None:
    """`amount` is in so many parts of what the limit counts."""
    limited = Limited(stack, f"killed {meter}", meter, limit)
    since = stack.up.lines_so_far
    hammer = limited.hammer(body)
    running = asyncio.create_task(hammer.run(each))
    await hammer.in_full_swing.wait()
    os.kill(stack.up.pid_of(f"gateway-{GATEWAYS}"), signal.SIGKILL)
    calls = await running
    used = await asyncio.to_thread(limited.use_at_the_end)
    if amount is None:
        assert most_at_once(calls) <= limit and used == 0
    elif meter.endswith("_per_minute"):  # what was used slides out of it meanwhile
        assert max(within(calls, MINUTE_S, amount)) <= limit and any(call.refused for call in calls)
    else:
        assert sum(map(amount, calls)) <= round(used * unit) <= limit * unit
        assert used >= 0.95 * limit
    await asyncio.to_thread(_wait_restarted, stack.up, since)


def _wait_restarted(up: HeadraceUp, since: int) -> None:
    up.wait_for_line(rf"^gateway-{GATEWAYS} +ready on", since=since)


def test_the_hammer_counts_what_it_saw() -> None:
    calls: Sequence[Call] = [
        Call(0.0, 1.0, 5.0, completion_tokens=2),
        Call(2.0, 4.0, 9.0, completion_tokens=3),
        Call(3.0, 5.0, 6.0, completion_tokens=5),
        Call(4.0, refused=True),
    ]
    assert most_at_once(calls) == 2
    assert list(within(calls, 6.0, tokens)) == [2, 5, 5]
    assert list(within(calls, 7.0, tokens)) == [7, 5, 5]
