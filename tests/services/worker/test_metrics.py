"""What the engine's counters become in the worker's metrics."""

from prometheus_client import CollectorRegistry

from services.worker.engine.counters import EngineCounters
from services.worker.engine_loop import EngineStatus, Turn
from services.worker.metrics import WorkerMetrics

LABELS = {"model_name": "m", "engine": "0"}


def turn(counters: EngineCounters) -> Turn:
    status = EngineStatus(counters, 1, 0, waiting_blocks=0, pending_prefill_tokens=0, commands=0)
    return Turn(status, held_blocks=None, result=None, failed=[], dropped=[], step_seconds=0.0)


def test_counters_grow_by_what_each_turn_added() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics("m", lambda: 0.5, registry)
    metrics.observe(turn(EngineCounters(draft_tokens=5, accepted_tokens=2, prefill_tokens=7)))
    metrics.observe(turn(EngineCounters(draft_tokens=9, accepted_tokens=3, prefill_tokens=7, preemptions=1)))
    expected = {"spec_decode_num_draft_tokens": 9, "spec_decode_num_accepted_tokens": 3}
    expected |= {"prompt_tokens": 7, "num_preemptions": 1}
    for name, value in expected.items():
        assert registry.get_sample_value(f"vllm:{name}_total", LABELS) == value
