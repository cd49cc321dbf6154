"""Times a model's steps without any service around it.

    HEADRACE_WORKER_DTYPE=bfloat16 HEADRACE_WORKER_QUANTIZE=int8 python -m services.worker.step_times

Settings are the worker's. A line for each kind of step: its median time, the rows that it computes per second, and how
fast as many threads read memory in between, which bounds a decode of few sequences; on a shared machine that changes
by the minute, and tells which times can be compared.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from services.common import config
from services.worker import model_store
from services.worker.build import build_runner
from services.worker.config import WorkerSettings
from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.model_runner import ModelRunner
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams

_REPEAT_S = 3.0
_READ_BYTES = 1 << 28
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
    clock = _Clock(torch.get_num_threads())
    for sequences, context in _DECODES:
        clock.report(f"decode of {sequences} at {context}", runner, _batch(runner, sequences, context - 1, 1))
    for sequences, before, tokens in _PREFILLS:
        name = f"prefill of {sequences} x {tokens} at {before}"
        clock.report(name, runner, _batch(runner, sequences, before, tokens))


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


class _Clock:
    """Times steps, and memory's reading beside them."""

    def __init__(self, threads: int) -> None:
        # The processor is settled by the runner, before anything of the kernels may be imported.
        from services.worker.engine.kernels.compiled.reading import read_memory

        pool, memory = ThreadPoolExecutor(threads), np.ones(_READ_BYTES, np.uint8)
        self._read = lambda: read_memory(memory, pool, threads)

    def report(self, name: str, runner: ModelRunner, batch: Batch) -> None:
        rows = sum(part.length for part in batch.slices)
        step_s, read_s = _medians_s(lambda: runner.forward(batch), self._read)
        rate = _READ_BYTES / read_s / 1e9
        print(f"{name:<28} {step_s * 1e3:8.2f} ms  {rows / step_s:8.0f} rows/s  memory at {rate:.1f} GB/s", flush=True)


def _medians_s(*works: Callable[[], object]) -> list[float]:
    """The median time of each, all done in turn."""
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    ends = time.perf_counter() + _REPEAT_S
    while time.perf_counter() < ends or not times[0]:
        for work, taken in zip(works, times, strict=True):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()
