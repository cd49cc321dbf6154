"""The load test's client against a fake server: the work is the one that the seed gives, and is counted right."""

import pytest

from tests.toolkit.fake_server import fake_server
from toolkit.loadtest import (
    MIXED,
    ROWS,
    TEXT,
    LoadFailed,
    Row,
    completes,
    draw_requests,
    first_model,
    lists_models,
    quantile,
    run_row,
)

SMALL = Row("small", requests=5, concurrency=2, shared_prefix=3, unique_prompt=range(2, 9), output=range(4, 20))


@pytest.mark.parametrize(
    ("count", "fraction", "rank"),
    [(1, 0.5, 1), (2, 0.5, 1), (3, 0.5, 2), (100, 0.5, 50), (100, 0.99, 99), (101, 0.99, 100), (5, 0, 1), (5, 1, 5)],
)
def test_a_quantile_is_the_least_value_with_enough_below_and_at_it(count: int, fraction: float, rank: int) -> None:
    assert quantile(range(count, 0, -1), fraction) == rank


def test_a_seed_always_gives_the_same_work() -> None:
    assert draw_requests(MIXED, seed=3) == draw_requests(MIXED, seed=3)
    assert draw_requests(MIXED, seed=3) != draw_requests(MIXED, seed=4)


def test_mixed_lengths_lie_in_their_ranges() -> None:
    work = draw_requests(MIXED, seed=3)[1:]
    assert len(work) == MIXED.requests
    assert {len(request.prompt) in range(16, 257) and request.output in range(8, 193) for request in work} == {True}
    assert len({request.output for request in work}) > MIXED.requests / 2


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_fixed_lengths_are_kept_and_only_the_prefix_is_shared(row: Row) -> None:
    work = draw_requests(row, seed=3)
    assert isinstance(row.unique_prompt, int)
    assert {(len(request.prompt), request.output) for request in work} == {
        (row.shared_prefix + row.unique_prompt, row.output)
    }
    assert len({request.prompt[: row.shared_prefix] for request in work}) == 1
    assert len({request.prompt for request in work}) == len(work)


def test_texts_are_asked_once_each() -> None:
    work = draw_requests(TEXT, seed=3)
    assert work != draw_requests(TEXT, seed=4)
    assert {request.prompt for request in work} < set(TEXT.texts)
    assert len({request.prompt for request in work}) == len(work) == 1 + TEXT.requests


async def test_what_is_asked_is_what_is_counted() -> None:
    with fake_server() as server:
        result = await run_row(server.url, await first_model(server.url), SMALL, seed=5)
        _warming, *asked = server.end()
    expected = draw_requests(SMALL, seed=5)[1:]
    assert sorted(event["prompt"] for event in asked) == sorted(list(request.prompt) for request in expected)
    tokens = sum(request.output for request in expected), sum(len(request.prompt) for request in expected)
    counted = result.output_tokens_per_s * result.wall_s, result.prompt_tokens_per_s * result.wall_s
    assert counted == pytest.approx(tokens)
    assert result.short_answers == 0
    assert result.server_ms == {"total": 7.0}


async def test_short_answers_are_counted() -> None:
    with fake_server("--mood", "short") as server:
        assert (await run_row(server.url, "fake", SMALL, seed=5)).short_answers == SMALL.requests


async def test_an_error_is_told() -> None:
    with fake_server("--mood", "fails") as server:
        with pytest.raises(LoadFailed, match="HTTP 500: out of order"):
            await run_row(server.url, "fake", SMALL, seed=5)
        assert await lists_models(server.url)
        assert not await completes(server.url, timeout_s=20)


async def test_a_server_that_is_gone_answers_nothing() -> None:
    with fake_server() as server:
        assert await completes(server.url, timeout_s=20)
        server.end()
        assert not await lists_models(server.url)
        assert not await completes(server.url, timeout_s=20)
        with pytest.raises(LoadFailed, match="no answer to POST /v1/completions"):
            await run_row(server.url, "fake", SMALL, seed=5)
