"""One supervised process through all its starts.

Knows nothing of what the process is: a command, an environment and a probe that says whether it is ready. It leads a
session of its own, so that a Ctrl-C in the terminal reaches only its supervisor; and it is tethered: it dies when the
supervisor dies, however that happens.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from services.common.channel import cancel_and_wait
from toolkit.restart_policy import RestartPolicy

Probe = Callable[[], Awaitable[bool]]
"""Whether the process is ready. Answers within a second or two and never raises."""

# Each probe takes some 5 ms of the processors that the models need: a connection is made for it.
_PROBE_WHILE_READY_S = 5.0
_PROBE_UNTIL_READY_S = 0.1


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    NOT_READY = "not ready"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to run. `environment` is all the process gets; its output is appended to `log_path`."""

    name: str
    # Where it can be reached, for people.
    address: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log_path: Path
    probe: Probe
    # Time between SIGTERM and SIGKILL when it is stopped.
    stop_grace_s: float


class ProcessFailed(Exception):
    """A process was given up: it does not start."""

    def __init__(self, process: "SupervisedProcess", exit_code: int) -> None:
        super().__init__(f"{process.spec.name} does not start: it ended {describe_exit(exit_code)}.")
        self.process = process


class SupervisedProcess:
    """Starts a process, follows its state, starts it again when it ends."""

    def __init__(self, spec: ProcessSpec, on_change: Callable[[], None]) -> None:
        self.spec = spec
        self.state = State.STARTING
        self.pid: int | None = None
        self.started_unix_s = 0.0
        self.last_exit_code: int | None = None
        self.ready = asyncio.Event()
        self._ready_since_s: float | None = None
        self._policy = RestartPolicy()
        self._on_change = on_change
        self._stop_asked = asyncio.Event()

    async def run(self) -> None:
        """Returns when the process was asked to stop and has ended. Raises ProcessFailed when it is given up."""
        while not self._stop_asked.is_set():
            self.last_exit_code = exit_code = await self._run_once()
            if self._stop_asked.is_set():
                break
            ready_for_s = None if self._ready_since_s is None else time.monotonic() - self._ready_since_s
            delay_s = self._policy.delay_after_end(exit_code, ready_for_s)
            if delay_s is None:
                self._enter(State.FAILED)
                raise ProcessFailed(self, exit_code)
            self._enter(State.RESTARTING)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop_asked.wait(), delay_s)
        self._enter(State.STOPPED)

    def ask_to_stop(self) -> None:
        """Sends SIGTERM; `run` returns when the process has ended."""
        self._stop_asked.set()
        if self.pid is not None:
            self._enter(State.STOPPING)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Ends the process, and all that it started, at once."""
        self._stop_asked.set()
        if self.pid is not None:
            _kill_group(self.pid)

    async def _run_once(self) -> int:
        process = await self._start()
        self.pid, self.started_unix_s, self._ready_since_s = process.pid, time.time(), None
        self._enter(State.STARTING)
        if self._stop_asked.is_set():  # while it was being started
            self.ask_to_stop()
        prober = asyncio.create_task(self._follow_readiness())
        exit_code = await process.wait()
        await cancel_and_wait([prober])
        _kill_group(process.pid)  # what it may have started and left behind
        self.pid = None
        self.ready.clear()
        return exit_code

    async def _start(self) -> asyncio.subprocess.Process:
        tether = (sys.executable, "-P", "-m", "toolkit.tether", str(os.getpid()))
        with self.spec.log_path.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *tether,
                *self.spec.command,
                env=self.spec.environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def _follow_readiness(self) -> None:
        while True:
            is_ready = await self.spec.probe()
            if self._stop_asked.is_set():
                return
            if is_ready:
                self._ready_since_s = self._ready_since_s or time.monotonic()
                self.ready.set()
                self._enter(State.READY)
            elif self._ready_since_s is not None:
                self.ready.clear()
                self._enter(State.NOT_READY)
            await asyncio.sleep(_PROBE_WHILE_READY_S if is_ready else _PROBE_UNTIL_READY_S)

    def _enter(self, state: State) -> None:
        if state is not self.state or state is State.STARTING:
            self.state = state
            self._on_change()


def describe_exit(exit_code: int) -> str:
    """`with status 1`, `by SIGKILL`."""
    return f"with status {exit_code}" if exit_code >= 0 else f"by {signal.Signals(-exit_code).name}"


def _kill_group(leader_pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader_pid, signal.SIGKILL)
