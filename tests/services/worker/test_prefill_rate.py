"""What a worker says of how fast it computes prompts."""

import pytest

from services.worker.engine.block_exchange import PublishedBlocks
from services.worker.engine.counters import EngineCounters
from services.worker.engine.engine import StepResult
from services.worker.engine_loop import EngineStatus, Turn
from services.worker.prefill_rate import PrefillRate


def turn(tokens: int, seconds: float) -> Turn:
    status = EngineStatus(
        EngineCounters(), running=1, waiting=0, waiting_blocks=0, pending_prefill_tokens=0, commands=0
    )
    result = StepResult([], [], [], [], PublishedBlocks([], [], []), (), tokens)
    return Turn(status, None, result, [], [], seconds)


def test_it_is_told_once_a_step_has_told_and_guessed_until_then() -> None:
    rate = PrefillRate()
    rate.observe(turn(63, 1.0))  # too few to tell
    assert rate.measured == 0 < rate.tokens_per_s
    rate.observe(turn(200, 2.0))
    assert rate.measured == rate.tokens_per_s == 100
    rate.observe(turn(200, 1.0))
    assert rate.tokens_per_s == pytest.approx(130)
