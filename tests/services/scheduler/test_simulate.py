"""Chats over a simulated fleet: what the real placement makes of them."""

import pytest

from services.scheduler.placement import Policy
from services.scheduler.simulate import Outcome, Simulation


def outcome(policy: Policy, workers: int, requests: int) -> Outcome:
    return Simulation(policy, workers, requests, seed=1).run()


@pytest.mark.parametrize(("workers", "requests"), [(4, 240), (48, 1200)])
def test_chats_find_their_kv_again(workers: int, requests: int) -> None:
    aware, around = outcome("kv_aware", workers, requests), outcome("round_robin", workers, requests)
    assert aware.prompt_tokens == around.prompt_tokens, "the same chats"
    assert aware.best_hit_tokens == around.best_hit_tokens
    assert 0.9 <= aware.hit_share <= 1
    assert aware.computed_tokens <= 0.5 * around.computed_tokens


def test_every_turn_is_counted_once() -> None:
    result = outcome("least_loaded", 3, 60)
    assert len(result.waits_s) == 60 <= len(result.placements_s)
    assert result.computed_tokens >= result.prompt_tokens - result.best_hit_tokens
