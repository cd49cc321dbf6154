"""Times a model's steps without any service around it.

    HEADRACE_WORKER_DTYPE=bfloat16 HEADRACE_WORKER_QUANTIZE=int8 python -m services.worker.step_times

Settings are the worker's. A line for each kind of step: its median time and the rows that it computes per second. Of
compiled models also what bounds it: how fast as many threads read memory and multiply, measured in turn with the step,
since on a shared machine that changes by the minute; and how much of the step's time reading the weights and the KV,
and multiplying with them, would take at these rates. The larger share is how near the step is to the machine's limit.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from services.common import config
from services.worker import model_store
from services.worker.build import build_runner
from services.worker.config import WorkerSettings
from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.kernels.compiled.isa import choose_isa
from services.worker.engine.model_runner import ModelRunner
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams

_REPEAT_S = 3.0
_DECODES = ((1, 160), (4, 200), (8, 200), (16, 200), (32, 200), (8, 1056))  # (sequences, their context in tokens)
# (sequences, tokens computed before, tokens)
_PREFILLS = ((1, 0, 32), (1, 0, 512), (1, 1024, 512), (1, 0, 1536), (4, 0, 128))


def main() -> None:
    settings = config.load(WorkerSettings, "worker")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    folder = model_store.resolve(settings.model, root=settings.store)
    runner = build_runner(settings, folder)
    runner.warm_up()
    runner.kv.storage.zero_()  # what was never written is one page of zeros to the system, and soon in a cache
    facts = runner.facts
    kind = " ".join(
        part
        for part in (facts.implementation, facts.instruction_set, str(facts.dtype), facts.quantization)
        if part not in ("", "none")
    )
    print(f"{kind}, {runner.weight_bytes / 1e6:.0f} MB of weights, {torch.get_num_threads()} threads")
    report = _bounded(settings, folder, runner) if facts.implementation == "compiled" else _timed(runner)
    for sequences, context in _DECODES:
        report(f"decode of {sequences} at {context}", _batch(runner, sequences, context - 1, 1))
    for sequences, before, tokens in _PREFILLS:
        report(f"prefill of {sequences} x {tokens} at {before}", _batch(runner, sequences, before, tokens))


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


def _timed(runner: ModelRunner) -> Callable[[str, Batch], None]:
    def report(name: str, batch: Batch) -> None:
        [step_s] = _medians_s(lambda: runner.forward(batch))
        print(_line(name, batch, step_s), flush=True)

    return report


def _bounded(settings: WorkerSettings, folder: Path, runner: ModelRunner) -> Callable[[str, Batch], None]:
    from services.worker.step_bounds import describe_bounds, make_probes, step_needs  # the model is loaded now

    isa = choose_isa(settings.instruction_set)
    needs = step_needs(folder, runner.facts, isa)
    probes = make_probes(needs, isa, torch.get_num_threads())

    def report(name: str, batch: Batch) -> None:
        step_s, *taken_s = _medians_s(lambda: runner.forward(batch), *(probe.run for probe in probes.values()))
        rates = {kind: probe.amount / s for (kind, probe), s in zip(probes.items(), taken_s, strict=True)}
        print(_line(name, batch, step_s), describe_bounds(needs.of(batch), rates, step_s), flush=True)

    return report


def _line(name: str, batch: Batch, step_s: float) -> str:
    rows = sum(part.length for part in batch.slices)
    return f"{name:<28} {step_s * 1e3:8.2f} ms  {rows / step_s:8.0f} rows/s  "


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
