"""Times a model's steps without any service around it.

    HEADRACE_WORKER_DTYPE=bfloat16 HEADRACE_WORKER_QUANTIZE=int8 python -m services.worker.step_times

Settings are the worker's. A line for each kind of step: its median time, and the rows that it computes per second.
Before and after them, how fast this machine's memory is read, which bounds a decode of few sequences; on a shared
machine it changes by the minute, and tells which times can be compared.
"""

import statistics
import time
from collections.abc import Callable

import torch

from services.common import config
from services.worker import model_store
from services.worker.build import build_runner
from services.worker.config import WorkerSettings
from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.model_runner import ModelRunner
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams

_REPEAT_S = 2.0
_READ_BYTES = 1 << 29
_DECODES = ((1, 160), (4, 200), (8, 200), (16, 200), (32, 200), (8, 1056))  # (sequences, their context in tokens)
_PREFILLS = ((1, 0, 512), (1, 1024, 512), (4, 0, 128))  # (sequences, tokens computed before, tokens)


def main() -> None:
    settings = config.load(WorkerSettings, "worker")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    folder = model_store.resolve(settings.model, root=settings.store)
    runner = build_runner(settings, folder)
    runner.warm_up()
    facts = runner.facts
    kind = " ".join(
        part
        for part in (facts.implementation, facts.instruction_set, str(facts.dtype), facts.quantization)
        if part not in ("", "none")
    )
    print(f"{kind}, {runner.weight_bytes / 1e6:.0f} MB of weights, {torch.get_num_threads()} threads")
    _report_memory()
    for sequences, context in _DECODES:
        _report(f"decode of {sequences} at {context}", runner, _batch(runner, sequences, context - 1, 1))
    for sequences, before, tokens in _PREFILLS:
        _report(f"prefill of {sequences} x {tokens} at {before}", runner, _batch(runner, sequences, before, tokens))
    _report_memory()


def _batch(runner: ModelRunner, sequences: int, before: int, tokens: int) -> Batch:
    """Sequences of `before` tokens that compute `tokens` more, each in blocks of its own as far as there are enough."""
    length = before + tokens
    needed = -(-length // runner.block_size)
    slices = []
    for index in range(sequences):
        sequence = Sequence(index, [1] * length, length, SamplingParams(), StopParams(max_tokens=1))
        sequence.blocks = [(index * needed + block) % runner.num_blocks for block in range(needed)]
        slices.append(Slice(sequence, before, tokens))
    return Batch(tuple(slices))


def _report(name: str, runner: ModelRunner, batch: Batch) -> None:
    rows = sum(part.length for part in batch.slices)
    median = _median_s(lambda: runner.forward(batch))
    print(f"{name:<28} {median * 1e3:8.2f} ms  {rows / median:8.0f} rows/s", flush=True)


def _report_memory() -> None:
    memory = torch.ones(_READ_BYTES // 4)
    print(f"memory is read at {_READ_BYTES / _median_s(memory.sum) / 1e9:.1f} GB/s", flush=True)


def _median_s(work: Callable[[], object]) -> float:
    work()
    times: list[float] = []
    while sum(times) < _REPEAT_S:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
