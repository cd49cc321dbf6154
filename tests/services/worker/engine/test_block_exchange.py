"""Blocks that leave and enter the engine: their bytes, digests and references, while the engine goes on."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.common.block_digest import digest
from services.worker.engine.batcher import Batcher
from services.worker.engine.batching_policy import ContinuousBatching
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.engine import Engine
from services.worker.engine.sequence import Sequence
from tests.fakes import FakeRunner, make_sequence

BLOCK_SIZE = 4
PROMPT = [(3 * position) % 31 for position in range(18)]


class Worker:
    """An engine and what it holds."""

    def __init__(self, num_blocks: int = 32, max_sequences: int = 4) -> None:
        self.runner = FakeRunner(num_blocks, BLOCK_SIZE)
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        batcher = Batcher(self.pool, max_sequences=max_sequences, max_batch_tokens=32, policy=ContinuousBatching())
        self.engine = Engine(self.runner, self.pool, batcher, max_context=num_blocks * BLOCK_SIZE)
        self.exchange = self.engine.exchange

    def run(self, *sequences: Sequence) -> None:
        expected = {sequence: self.runner.expected_tokens(sequence) for sequence in sequences}
        for sequence in sequences:
            self.engine.add(sequence)
        for _ in range(500):
            if not self.engine.has_work:
                break
            self.engine.step()
        for sequence in sequences:
            assert sequence.tokens == expected[sequence]


def computed(worker: Worker, prompt: list[int] = PROMPT) -> list[bytes]:
    """Has a worker compute a prompt; the names of its full blocks."""
    sequence = make_sequence("computed", prompt, max_tokens=1)
    worker.run(sequence)
    return sequence.hashes


def move(names: list[bytes], source: Worker, target: Worker) -> list[int]:
    held = source.exchange.hold(names)
    blocks = target.exchange.take(len(held), keep_free=0)
    assert blocks is not None
    for block, origin in zip(blocks, held, strict=True):
        target.exchange.fill(block, origin.name, source.exchange.read(origin.block))
    source.exchange.release(origin.block for origin in held)
    return blocks


def test_a_moved_prefix_is_not_computed_again_and_gives_the_same_tokens() -> None:
    source, target = Worker(), Worker()
    names = computed(source)
    sequence = make_sequence("moved", PROMPT)
    sequence.held = move(names, source, target)
    target.run(sequence)
    assert sequence.cached_tokens == 16
    assert target.engine.counters.prefill_tokens == len(PROMPT) - 16
    assert source.pool.free_blocks == target.pool.free_blocks == 32, "nobody holds anything any more"


def test_published_digests_are_those_of_the_bytes() -> None:
    worker = Worker()
    worker.engine.add(make_sequence(1, PROMPT, max_tokens=1))
    events = worker.engine.step().block_events
    assert len(events.stored) == len(events.digests) == 4
    held = worker.exchange.hold(events.stored)
    assert [block.name for block in held] == events.stored
    assert [block.digest for block in held] == events.digests
    assert [digest(worker.exchange.read(block.block)) for block in held] == events.digests
    worker.exchange.release(block.block for block in held)
    assert worker.exchange.snapshot().digests == events.digests


def test_a_held_block_is_not_evicted_and_a_released_one_is() -> None:
    worker = Worker(num_blocks=8)
    names = computed(worker)
    held = worker.exchange.hold(names)
    assert worker.exchange.take(5, keep_free=0) is None
    worker.exchange.release(block.block for block in held)
    fresh = worker.exchange.take(5, keep_free=0)
    assert fresh is not None
    assert len(worker.exchange.hold(names)) < 4


def test_a_chain_is_held_up_to_its_first_gap() -> None:
    worker = Worker()
    names = computed(worker)
    assert [block.name for block in worker.exchange.hold([*names[:2], b"missing", *names[2:]])] == names[:2]


def test_what_is_no_block_is_refused_and_stays_unnamed() -> None:
    worker = Worker()
    blocks = worker.exchange.take(1, keep_free=0)
    assert blocks is not None
    with pytest.raises(ValueError, match="a block has 32 bytes, not 3"):
        worker.exchange.fill(blocks[0], b"n" * 16, b"abc")
    assert not worker.exchange.hold([b"n" * 16])
    worker.exchange.release(blocks)


def test_what_is_kept_for_those_who_wait_gives_way_to_those_who_run() -> None:
    source, target = Worker(), Worker(num_blocks=9)
    names = computed(source)
    running = make_sequence("running", [1, 2, 3], max_tokens=29)  # will need eight blocks
    target.engine.add(running)
    target.engine.step()
    waiting = [make_sequence("first", PROMPT, 4), make_sequence("second", PROMPT, 4)]
    waiting[0].held = move(names, source, target)
    target.run(*waiting)
    assert running.finish is not None
    assert target.pool.free_blocks == 9


def test_a_cancelled_sequence_gives_back_what_was_kept_for_it() -> None:
    source, target = Worker(), Worker()
    sequence = make_sequence("moved", PROMPT)
    sequence.held = move(computed(source), source, target)
    target.engine.add(sequence)
    target.engine.cancel("moved")
    assert target.pool.free_blocks == 32


def test_others_take_and_give_blocks_while_the_engine_steps() -> None:
    source, target = Worker(), Worker(num_blocks=24)
    names = computed(source)
    bytes_of = {block.name: source.exchange.read(block.block) for block in source.exchange.hold(names)}
    stop = threading.Event()

    def exchange() -> None:
        while not stop.is_set():
            held = target.exchange.hold(names)
            for block in held:
                assert target.exchange.read(block.block) == bytes_of[block.name]
            blocks = target.exchange.take(len(names) - len(held), keep_free=8) or []
            for block, name in zip(blocks, names[len(held) :], strict=False):
                target.exchange.fill(block, name, bytes_of[name])
            target.exchange.release([*(block.block for block in held), *blocks])

    with ThreadPoolExecutor(3) as threads:
        exchanges = [threads.submit(exchange) for _ in range(3)]
        try:
            for turn in range(20):
                target.run(*(make_sequence((turn, index), [turn, index, *PROMPT], 12) for index in range(3)))
            target.run(make_sequence("prefix", PROMPT, 8))
        finally:
            stop.set()
    for outcome in exchanges:
        outcome.result()
    assert target.pool.free_blocks == 24
