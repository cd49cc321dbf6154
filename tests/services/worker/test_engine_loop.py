"""The engine's thread: real sequences and a real engine over a toy model, or an engine that fails on demand."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from torch import Tensor

from services.worker.engine.batcher import Batch, Batcher
from services.worker.engine.batching_policy import BatchingPolicy, ContinuousBatching, StaticBatching
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.engine import Engine
from services.worker.engine.sequence import Sequence
from services.worker.engine_loop import EngineLoop, Turn
from tests.fakes import FakeRunner, make_sequence

BLOCK_SIZE = 4


class BrokenRunner(FakeRunner):
    """One whose device is gone."""

    def __init__(self) -> None:
        super().__init__(num_blocks=32, block_size=BLOCK_SIZE)

    def forward(self, batch: Batch) -> Tensor:
        raise RuntimeError("device lost")


class Harness:
    """An engine loop and every turn it made."""

    def __init__(self, policy: BatchingPolicy | None = None, runner: FakeRunner | None = None) -> None:
        self.runner = runner or FakeRunner(num_blocks=32, block_size=BLOCK_SIZE)
        self.pool = BlockPool(32, BLOCK_SIZE)
        batcher = Batcher(self.pool, max_sequences=4, max_batch_tokens=16, policy=policy or ContinuousBatching())
        self.loop = EngineLoop(Engine(self.runner, self.pool, batcher, max_context=64), BLOCK_SIZE)
        self.turns: list[Turn] = []
        self._news = asyncio.Event()

    def start(self) -> None:
        self.loop.start(self._on_turn)

    def _on_turn(self, turn: Turn) -> None:
        self.turns.append(turn)
        self._news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Awaits turns until something holds (the test's timeout is the limit)."""
        while not holds():
            self._news.clear()
            await self._news.wait()

    async def finished(self, *sequences: Sequence) -> None:
        keys = {sequence.key for sequence in sequences}
        await self.until(lambda: keys <= {key for turn in self.turns if turn.result for key in finished_keys(turn)})

    def tokens_of(self, sequence: Sequence) -> list[int]:
        results = [turn.result for turn in self.turns if turn.result is not None]
        return [token for result in results for owner, token in result.tokens if owner is sequence]


def finished_keys(turn: Turn) -> list[object]:
    return [sequence.key for sequence in turn.result.finished] if turn.result else []


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    harness = Harness()
    harness.start()
    yield harness
    await harness.loop.stop()


async def test_sequences_join_while_others_run(harness: Harness) -> None:
    first, second = make_sequence(1, [3, 4, 5], max_tokens=30), make_sequence(2, [6], max_tokens=3)
    harness.loop.add([first])
    await harness.until(lambda: bool(harness.tokens_of(first)))
    harness.loop.add([second])
    await harness.finished(first, second)
    for sequence in (first, second):
        expected = harness.runner.expected_tokens(
            make_sequence(0, sequence.tokens[: sequence.prompt_length], sequence.stop.max_tokens)
        )
        assert sequence.tokens == expected
        assert harness.tokens_of(sequence) == expected[sequence.prompt_length :]
    assert harness.pool.free_blocks == 32


async def test_a_turn_says_which_commands_it_reflects(harness: Harness) -> None:
    number = harness.loop.add([make_sequence(1, [3] * 9, max_tokens=2)])
    await harness.until(lambda: bool(harness.turns) and harness.turns[-1].status.commands >= number)
    turn = next(turn for turn in harness.turns if turn.status.commands >= number)
    assert turn.result is not None and turn.status.counters.steps == 1


async def test_followers_weigh_what_they_do_not_share_with_their_leader(harness: Harness) -> None:
    """The prompt takes more than one step, for which the others wait."""
    prompt = [3] * 30
    leader = make_sequence(0, prompt, max_tokens=2)
    followers = [make_sequence(choice, prompt, max_tokens=2, choice=choice, leader=leader) for choice in (1, 2)]
    harness.loop.add([leader, *followers])
    await harness.finished(leader, *followers)
    first = harness.turns[0].status
    assert (first.running, first.waiting) == (1, 2)
    assert first.waiting_blocks == 2, "one each, beside the seven full ones of the leader"
    assert first.pending_prefill_tokens == (30 - 16) + 2 * (30 - 28)


async def test_a_cancelled_sequence_frees_its_blocks_without_another_step(harness: Harness) -> None:
    sequence = make_sequence(1, [3, 4, 5], max_tokens=60)
    harness.loop.add([sequence])
    await harness.until(lambda: bool(harness.tokens_of(sequence)))
    harness.loop.cancel([1, "never heard of"])
    await harness.until(lambda: harness.pool.free_blocks == 32)
    assert harness.turns[-1].status.running == 0
    turns = len(harness.turns)
    harness.loop.cancel([1])
    await harness.until(lambda: len(harness.turns) > turns)
    assert harness.turns[-1].result is None


async def test_a_snapshot_and_the_events_after_it_give_the_pools_names(harness: Harness) -> None:
    first = make_sequence(1, list(range(1, 10)), max_tokens=2)
    harness.loop.add([first])
    await harness.finished(first)
    harness.loop.request_snapshot()
    await harness.until(lambda: harness.turns[-1].held_blocks is not None)
    snapshot = harness.turns[-1].held_blocks
    assert snapshot is not None
    held = set(snapshot.stored)
    assert len(held) == 2
    second = make_sequence(2, list(range(11, 20)), max_tokens=2)
    after = len(harness.turns)
    harness.loop.add([second])
    await harness.finished(second)
    for turn in harness.turns[after:]:
        assert turn.result is not None
        held = (held - set(turn.result.block_events.removed)) | set(turn.result.block_events.stored)
    assert held == set(harness.pool.held_hashes())


async def test_a_failing_step_ends_its_sequences_and_the_engine_goes_on(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    harness.runner.fail_next = RuntimeError("no memory")
    victim = make_sequence(1, [3, 4, 5])
    harness.loop.add([victim])
    await harness.until(lambda: any(turn.failed for turn in harness.turns))
    [(failed, reason)] = next(turn.failed for turn in harness.turns if turn.failed)
    assert failed is victim and "RuntimeError" in reason
    assert "a step failed, which ends sequences 1" in caplog.text
    other = make_sequence(2, [3, 4, 5])
    harness.loop.add([other])
    await harness.finished(other)
    assert other.tokens == harness.runner.expected_tokens(make_sequence(0, [3, 4, 5]))
    assert harness.pool.free_blocks == 32


async def test_what_the_engine_refuses_fails_alone(harness: Harness) -> None:
    harness.loop.add([make_sequence(1, [3], max_tokens=100)])
    await harness.until(lambda: any(turn.failed for turn in harness.turns))
    assert "context of 64" in harness.turns[-1].failed[0][1]


async def test_an_engine_that_only_fails_dies() -> None:
    harness = Harness(runner=BrokenRunner())
    harness.start()
    for key in range(4):
        harness.loop.add([make_sequence(key, [3])])
        await harness.until(lambda key=key: len([turn for turn in harness.turns if turn.failed]) == key + 1)
    harness.loop.add([make_sequence(4, [3])])
    with pytest.raises(RuntimeError, match="device lost"):
        await harness.loop.ended()


async def test_a_static_batch_that_fills_is_waited_for_without_spinning() -> None:
    now = [0.0]
    harness = Harness(StaticBatching(size=2, timeout_s=1.0, clock=lambda: now[0]))
    harness.start()
    alone = make_sequence(1, [3, 4], max_tokens=2)
    harness.loop.add([alone])
    await harness.until(lambda: bool(harness.turns) and harness.turns[-1].result is not None)
    assert harness.turns[-1].result and harness.turns[-1].result.computed_tokens == 0
    now[0] = 2.0
    await harness.finished(alone)
    await harness.loop.stop()
