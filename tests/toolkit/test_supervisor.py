"""Real processes that start, fail, die and are stopped."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from toolkit.process import ProcessFailed, ProcessSpec, State, SupervisedProcess
from toolkit.supervisor import Supervisor

HOLD_SIGTERM = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); "
WAIT_FOR_SIGTERM = HOLD_SIGTERM + "signal.sigwait([signal.SIGTERM])"


def touch_then(path: Path, rest: str) -> str:
    return HOLD_SIGTERM + f"import pathlib; pathlib.Path({str(path)!r}).touch(); {rest}"


class Changes:
    """Lets a test wait until something about the processes is so."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()

    def notify(self) -> None:
        self._task = asyncio.ensure_future(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(condition)


class Stage:
    """A supervisor and what a test needs to give it processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.changes = Changes()
        self.supervisor = Supervisor(self.changes.notify)

    def ready_file(self, name: str) -> Path:
        return self.folder / f"{name}.ready"

    def spec(self, name: str, script: str, *, stop_grace_s: float = 20.0) -> ProcessSpec:
        async def probe() -> bool:
            return self.ready_file(name).exists()

        return self.spec_with(name, script, probe, stop_grace_s)

    def spec_with(
        self, name: str, script: str, probe: Callable[[], Awaitable[bool]], stop_grace_s: float = 20.0
    ) -> ProcessSpec:
        command = (sys.executable, "-c", script)
        return ProcessSpec(name, "here", command, dict(os.environ), self.folder / f"{name}.log", probe, stop_grace_s)

    def process(self, name: str) -> SupervisedProcess:
        return next(process for process in self.supervisor.processes if process.spec.name == name)


@asynccontextmanager
async def open_stage(folder: Path) -> AsyncIterator[Stage]:
    stage = Stage(folder)
    try:
        yield stage
    finally:
        stage.supervisor.kill()
        await stage.supervisor.stop()


async def test_a_process_becomes_ready_and_stops_by_sigterm(tmp_path: Path) -> None:
    async with open_stage(tmp_path) as stage:
        stage.supervisor.start([stage.spec("p", touch_then(stage.ready_file("p"), WAIT_FOR_SIGTERM))])
        await stage.supervisor.wait_ready()
        process = stage.process("p")
        assert process.state is State.READY
        assert process.pid is not None
        assert await stage.supervisor.stop() == []
        assert process.state is State.STOPPED
        assert process.last_exit_code == 0


async def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    async with open_stage(tmp_path) as stage:
        stage.supervisor.start([stage.spec("p", touch_then(stage.ready_file("p"), WAIT_FOR_SIGTERM))])
        await stage.supervisor.wait_ready()
        process = stage.process("p")
        first = process.pid
        assert first is not None
        stage.ready_file("p").unlink()
        os.kill(first, signal.SIGKILL)
        await stage.changes.until(lambda: process.state is State.READY and process.pid not in (None, first))
        assert process.last_exit_code == -signal.SIGKILL


async def test_a_process_that_never_starts_is_given_up_with_its_log(tmp_path: Path) -> None:
    async with open_stage(tmp_path) as stage:
        stage.supervisor.start([stage.spec("p", "raise SystemExit('no such model')")])
        async with asyncio.timeout(20):
            with pytest.raises(ProcessFailed, match="p does not start: it ended with status 1") as failure:
                await stage.supervisor.wait_failed()
        assert failure.value.process.state is State.FAILED
        assert (tmp_path / "p.log").read_text() == "no such model\n" * 3


async def test_a_process_may_turn_unready_and_ready_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.process._PROBE_WHILE_READY_S", 0.1)
    answers = iter([True, False, True])

    async def probe() -> bool:
        return next(answers, True)

    seen: list[State] = []
    async with open_stage(tmp_path) as stage:
        stage.supervisor.start([stage.spec_with("p", WAIT_FOR_SIGTERM, probe)])
        process = stage.process("p")
        for state in (State.READY, State.NOT_READY, State.READY):
            await stage.changes.until(lambda state=state: process.state is state)
            seen.append(process.state)
    assert seen == [State.READY, State.NOT_READY, State.READY]


async def test_tiers_stop_last_started_first(tmp_path: Path) -> None:
    order = tmp_path / "order"

    def script(name: str) -> str:
        note = f"; open({str(order)!r}, 'a').write('{name} ')"
        return touch_then(tmp_path / f"{name}.ready", WAIT_FOR_SIGTERM) + note

    async with open_stage(tmp_path) as stage:
        for tier in (["redis"], ["worker-1", "worker-2"], ["gateway"]):
            stage.supervisor.start([stage.spec(name, script(name)) for name in tier])
        await stage.supervisor.wait_ready()
        await stage.supervisor.stop()
    gateway, *workers, redis = order.read_text().split()
    assert (gateway, sorted(workers), redis) == ("gateway", ["worker-1", "worker-2"], "redis")


async def test_one_that_ignores_sigterm_is_killed_and_named(tmp_path: Path) -> None:
    async with open_stage(tmp_path) as stage:
        script = touch_then(stage.ready_file("p"), "import time; time.sleep(600)")  # SIGTERM stays held
        stage.supervisor.start([stage.spec("p", script, stop_grace_s=0.1)])
        await stage.supervisor.wait_ready()
        assert await stage.supervisor.stop() == [stage.process("p")]
        assert stage.process("p").last_exit_code == -signal.SIGKILL


async def test_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
    child_pid = tmp_path / "child"
    script = (
        "import subprocess, pathlib; child = subprocess.Popen(['sleep', '600']); "
        f"pathlib.Path({str(child_pid)!r}).write_text(str(child.pid)); "
    )
    async with open_stage(tmp_path) as stage:
        stage.supervisor.start([stage.spec("p", script + touch_then(stage.ready_file("p"), WAIT_FOR_SIGTERM))])
        await stage.supervisor.wait_ready()
        child = psutil.Process(int(child_pid.read_text()))
        await stage.supervisor.stop()
        # Who inherits an orphan may take its time to reap it.
        gone = not child.is_running() or child.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        assert gone or psutil.wait_procs([child], timeout=5)[0]
