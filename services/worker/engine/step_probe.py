"""Times and traces an engine's steps while somebody asks for it. An engine without a probe does nothing for it.

All of it happens on the engine's thread. The first steps are timed alone, since a trace with stacks slows what it
records; the steps after those are traced by torch, with every phase marked. On a CPU the model's part of a step is one
compiled function, so a trace shows it as one mark; on the torch path every operator shows.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, record_function

from services.worker.engine.batcher import Batch
from services.worker.engine.engine import Draw, Drawn, Engine, Forward, StepResult

_PAGE_BYTES = 4096
_OPERATOR_ROWS = 100


@dataclass(slots=True)
class Phase:
    """What one kind of work took, over all timed steps."""

    seconds: float = 0.0
    tokens: int = 0
    memory_delta_bytes: int = 0

    def add(self, seconds: float, tokens: int, memory_delta_bytes: int) -> None:
        self.seconds += seconds
        self.tokens += tokens
        self.memory_delta_bytes += memory_delta_bytes


class StepProbe:
    """One profile: `step` in place of the engine's own until `ended`. Its results are read after that."""

    def __init__(self, engine: Engine, *, steps: int, traced_steps: int, on_end: Callable[[], None]) -> None:
        """`on_end` is called on the engine's thread, once."""
        self.steps = self.traced_steps = 0
        self.ended = False
        self.step_seconds = 0.0
        self.prefill, self.decode, self.sample = Phase(), Phase(), Phase()
        self.memory_before_bytes = self.peak_memory_bytes = memory_bytes()
        self.trace: profile | None = None
        self._engine = engine
        self._wanted_steps, self._wanted_traced_steps = steps, traced_steps
        self._on_end = on_end
        self._first_began: float | None = None
        self._last_ended = 0.0

    @property
    def seconds(self) -> float:
        """From the beginning of the first timed step to the end of the last."""
        return 0.0 if self._first_began is None else self._last_ended - self._first_began

    def begin(self) -> None:
        self._engine.watch(self)

    def step(self) -> StepResult:
        """A step of the engine, timed or traced."""
        timing = self.steps < self._wanted_steps
        if not timing and self.trace is None:
            self._start_trace()
        began = time.perf_counter()
        with record_function("step"):
            result = self._engine.step()
        if result.computed_tokens:  # not while a static batch fills
            self._count(began, timing=timing)
        return result

    def end(self) -> None:
        """Stops what runs; the engine is as if there had been no probe. A second call does nothing."""
        if self.ended:
            return
        self.ended = True
        self._engine.watch(None)
        if self.trace is not None:
            self.trace.stop()
        self._on_end()

    def forward(self, forward: Forward) -> Forward:
        """The model's part of a step, timed. A step with prompts and outputs is shared out by tokens."""

        def timed(batch: Batch) -> Tensor:
            tokens = sum(piece.length for piece in batch.slices)
            decoded = sum(piece.length for piece in batch.slices if piece.start >= piece.sequence.prompt_length)
            parts = [(self.decode, decoded), (self.prefill, tokens - decoded)]
            name = " and ".join(name for name, count in (("prefill", tokens - decoded), ("decode", decoded)) if count)
            with self._timed(name, [(phase, count, count / tokens) for phase, count in parts if count]):
                logits = forward(batch)
                if logits.is_cuda:
                    torch.cuda.synchronize(logits.device)
            return logits

        return timed

    def draw(self, draw: Draw) -> Draw:
        """The drawing of tokens, timed."""

        def timed(logits: Tensor, batch: Batch) -> Drawn:
            shares: list[tuple[Phase, int, float]] = []
            with self._timed("sample", shares):
                drawn = draw(logits, batch)
                shares.append((self.sample, len(drawn.tokens), 1.0))
            return drawn

        return timed

    @contextmanager
    def _timed(self, name: str, shares: list[tuple[Phase, int, float]]) -> Iterator[None]:
        before, began = memory_bytes(), time.perf_counter()
        with record_function(name):
            yield
        seconds = time.perf_counter() - began
        memory = memory_bytes()
        if self.trace is None:
            self.peak_memory_bytes = max(self.peak_memory_bytes, memory)
            for phase, tokens, share in shares:
                phase.add(seconds * share, tokens, round((memory - before) * share))

    def _count(self, began: float, *, timing: bool) -> None:
        if timing:
            self._last_ended = time.perf_counter()
            self._first_began = began if self._first_began is None else self._first_began
            self.step_seconds += self._last_ended - began
            self.steps += 1
        else:
            self.traced_steps += 1
        if self.steps == self._wanted_steps and self.traced_steps == self._wanted_traced_steps:
            self.end()

    def _start_trace(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if _on_gpu() else [])]
        self.trace = profile(activities=activities, record_shapes=True, profile_memory=True, with_stack=True)
        self.trace.start()


def memory_bytes() -> int:
    """What this process has allocated on its GPU, or else its resident memory."""
    if _on_gpu():
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * _PAGE_BYTES


def _on_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _is_python(name: str) -> bool:
    """Whether an event is a Python function of a stack, and no operator or mark."""
    return ".py(" in name or name.startswith("<")


def export_trace(trace: profile, folder: Path) -> list[Path]:
    """The trace as Chrome's and Perfetto's JSON, compressed, and the operators by time as a table. Takes seconds."""
    paths = [folder / "trace.json.gz", folder / "operators.txt"]
    trace.export_chrome_trace(str(paths[0]))
    order = "self_cuda_time_total" if ProfilerActivity.CUDA in trace.activities else "self_cpu_time_total"
    averages = [average for average in trace.key_averages(group_by_input_shape=True) if not _is_python(average.key)]
    device = trace.profiler.use_device if trace.profiler else None
    operators: Any = EventList  # untyped
    table = operators(averages, use_device=device, profile_memory=True)
    paths[1].write_text(table.table(sort_by=order, row_limit=_OPERATOR_ROWS))
    return paths
