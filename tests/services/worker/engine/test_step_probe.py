"""What a probe says of an engine's steps, and that it leaves nothing behind."""

import gzip
import json
from pathlib import Path

import pytest

from services.worker.engine.batcher import Batcher
from services.worker.engine.batching_policy import ContinuousBatching
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.engine import Engine
from services.worker.engine.step_probe import StepProbe, export_trace
from tests.fakes import FakeRunner, make_sequence

BLOCK_SIZE = 4


@pytest.fixture
def engine() -> Engine:
    pool = BlockPool(64, BLOCK_SIZE)
    batcher = Batcher(pool, max_sequences=4, max_batch_tokens=16, policy=ContinuousBatching())
    engine = Engine(FakeRunner(64, BLOCK_SIZE), pool, batcher, max_context=200)
    engine.add(make_sequence(1, [5] * 6, max_tokens=30))
    engine.add(make_sequence(2, [7] * 12, max_tokens=30))
    return engine


def probe_of(engine: Engine, steps: int, traced_steps: int) -> tuple[StepProbe, list[None]]:
    ends: list[None] = []
    probe = StepProbe(engine, steps=steps, traced_steps=traced_steps, on_end=lambda: ends.append(None))
    probe.begin()
    return probe, ends


def run(probe: StepProbe) -> None:
    while not probe.ended:
        probe.step()


def test_phases_hold_the_tokens_of_the_timed_steps_and_their_time(engine: Engine) -> None:
    probe, ends = probe_of(engine, 5, 0)
    run(probe)
    assert ends == [None]
    assert (probe.steps, probe.traced_steps, probe.trace) == (5, 0, None)
    assert probe.prefill.tokens == 18, "both prompts, the second one in two pieces"
    assert probe.decode.tokens == 7, "the first sequence in four steps, the second in three"
    assert probe.sample.tokens == 9
    spent = probe.prefill.seconds + probe.decode.seconds + probe.sample.seconds
    assert 0 < spent <= probe.step_seconds <= probe.seconds
    assert probe.peak_memory_bytes >= probe.memory_before_bytes > 0


def test_a_trace_shows_the_phases_and_the_operators(engine: Engine, tmp_path: Path) -> None:
    probe, _ = probe_of(engine, 1, 3)
    run(probe)
    assert (probe.steps, probe.traced_steps) == (1, 3)
    assert probe.trace is not None
    trace, operators = export_trace(probe.trace, tmp_path)
    names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert [names.count(name) for name in ("step", "prefill and decode", "decode", "sample")] == [3, 1, 2, 3]
    assert any("aten::" in str(name) for name in names)
    assert any("sampling.py" in str(name) for name in names), "stacks are recorded"
    assert "aten::" in operators.read_text() and ".py(" not in operators.read_text()


def test_after_the_end_the_engine_is_as_before(engine: Engine) -> None:
    before = (engine._forward, engine._draw)
    probe, ends = probe_of(engine, 3, 3)
    probe.step()
    assert engine._forward != before[0]
    probe.end()
    probe.end()
    assert ends == [None]
    assert (engine._forward, engine._draw) == before
    steps = probe.decode.tokens
    engine.step()
    assert probe.decode.tokens == steps
