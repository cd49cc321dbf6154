"""Profiles the engine for whoever asks, one caller at a time: a report of what its steps take, and files of a trace."""

import asyncio
import dataclasses
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from headrace.v1.profile_pb2 import ProfileFile, ProfilePart, ProfilePhase, ProfileReport, ProfileRequest
from services.common.errors import DeadlineExceeded, InvalidRequest, Overloaded
from services.worker.engine.step_probe import Phase, StepProbe, export_trace
from services.worker.engine_loop import EngineLoop
from services.worker.kv_metrics import KvMetrics, Moved

_CHUNK_BYTES = 1024 * 1024
_MOST_STEPS = 100_000
_MOST_TRACED_STEPS = 1_000  # a step with its stacks takes some 100 KB of a trace
_LONGEST_MS = 600_000


class Profiler:
    """The profiles of one worker."""

    def __init__(self, worker_id: str, engine: EngineLoop, kv_metrics: KvMetrics, block_size: int) -> None:
        self._worker_id = worker_id
        self._engine = engine
        self._kv_metrics = kv_metrics
        self._block_size = block_size
        self._running = False

    async def run(self, request: ProfileRequest) -> AsyncIterator[ProfilePart]:
        """The report, then the trace's files in chunks. A caller that goes away ends the profile.

        Raises InvalidRequest, Overloaded while another one runs, and DeadlineExceeded when no step came.
        """
        _check(request)
        if self._running:
            raise Overloaded(f"A profile of {self._worker_id} is running already.", reason="profiling")
        self._running = True
        try:
            moved = dataclasses.replace(self._kv_metrics.moved)
            probe = await self._probe(request)
            if not probe.steps:
                raise DeadlineExceeded(
                    f"{self._worker_id} made no step within {request.timeout_ms / 1000:g} s: it is idle."
                )
            yield ProfilePart(report=self._report(probe, self._since(moved)))
            if probe.trace is not None:
                with tempfile.TemporaryDirectory(prefix="headrace-profile-") as folder:
                    for path in await asyncio.to_thread(export_trace, probe.trace, Path(folder)):
                        for part in _parts(path):
                            yield part
        finally:
            self._running = False

    async def _probe(self, request: ProfileRequest) -> StepProbe:
        """Profiles until all steps were made or the time is over."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_end() -> None:
            loop.call_soon_threadsafe(ended.set)

        probe = self._engine.profile(steps=request.steps, traced_steps=request.traced_steps, on_end=on_end)
        try:
            async with asyncio.timeout(request.timeout_ms / 1000):
                await ended.wait()
        except TimeoutError:
            pass
        finally:
            self._engine.end_profile(probe)
        await ended.wait()  # a step may have been under way
        return probe

    def _since(self, before: Moved) -> Moved:
        now = self._kv_metrics.moved
        return Moved(now.blocks - before.blocks, now.size - before.size, now.seconds - before.seconds)

    def _report(self, probe: StepProbe, moved: Moved) -> ProfileReport:
        timed = {"prefill": probe.prefill, "decode": probe.decode, "sample": probe.sample}
        spent = sum(phase.seconds for phase in timed.values())
        other = Phase(seconds=max(0.0, probe.step_seconds - spent), tokens=probe.sample.tokens)
        phases = [
            ProfilePhase(
                name=name, tokens=phase.tokens, seconds=phase.seconds, memory_delta_bytes=phase.memory_delta_bytes
            )
            for name, phase in {**timed, "other": other}.items()
        ]
        tokens = moved.blocks * self._block_size
        phases.append(ProfilePhase(name="transfer", tokens=tokens, seconds=moved.seconds, bytes_moved=moved.size))
        return ProfileReport(
            worker_id=self._worker_id,
            steps=probe.steps,
            traced_steps=probe.traced_steps,
            seconds=probe.seconds,
            step_seconds=probe.step_seconds,
            phases=phases,
            peak_memory_bytes=probe.peak_memory_bytes,
            memory_before_bytes=probe.memory_before_bytes,
        )


def _check(request: ProfileRequest) -> None:
    limits = (("steps", 1, _MOST_STEPS), ("traced_steps", 0, _MOST_TRACED_STEPS), ("timeout_ms", 1, _LONGEST_MS))
    for field, least, most in limits:
        if not least <= getattr(request, field) <= most:
            raise InvalidRequest(f"{field} must lie between {least} and {most}.", field=field)


def _parts(path: Path) -> Iterator[ProfilePart]:
    with path.open("rb") as file:
        while data := file.read(_CHUNK_BYTES):
            yield ProfilePart(file=ProfileFile(name=path.name, data=data))
