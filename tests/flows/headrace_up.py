"""`headrace up` as a person runs it: a process whose lines are read, on free ports, with a state folder of its own."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import grpc
import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from headrace.v1.scheduler_pb2 import DescribeFleetRequest, DescribeFleetResponse
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from toolkit.run_directory import RunningProcess, RunningStack, running_stacks

HEADRACE = (sys.executable, "-P", "-m", "toolkit.main")
START_TIMEOUT_S = 240.0


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Waits for what another process tells nobody about. Where there is an event, wait for the event."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


class HeadraceUp:
    """A running stack. Starts at construction; `wait_ready` before it is used, `kill` at its end."""

    def __init__(self, folder: Path, *options: str, settings: Mapping[str, str] | None = None) -> None:
        """`settings`: HEADRACE_SERVICE_SETTING variables."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
        self.environment = {**own, "XDG_STATE_HOME": str(folder), **(settings or {})}
        self._runs = folder / "headrace" / "run"
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            (*HEADRACE, "up", "--http-port", "0", "--grpc-port", "0", *options),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self._lines)

    @property
    def lines_so_far(self) -> int:
        return len(self._lines)

    @property
    def state(self) -> RunningStack:
        (stack,) = running_stacks(self._runs)
        return stack

    @property
    def http_url(self) -> str:
        return self.state.http_url

    @property
    def grpc_address(self) -> str:
        return self.state.grpc_address

    def member(self, name: str) -> RunningProcess:
        return next(process for process in self.state.processes if process.name == name)

    def pid_of(self, name: str) -> int:
        pid = self.member(name).pid
        assert pid is not None, f"{name} does not run"
        return pid

    def metric(self, member: str, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels, as a process of the stack tells it now."""
        url = self.member(member).metrics_url
        assert url is not None, f"{member} has no metrics"
        families = text_string_to_metric_families(httpx.get(url, timeout=10).text)
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def run(self, *command: str) -> str:
        """What another `headrace` command, typed on the same machine, prints."""
        done = subprocess.run((*HEADRACE, *command), env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fleet(self) -> DescribeFleetResponse:
        """The workers as the scheduler sees them."""
        with grpc.insecure_channel(self.state.scheduler_address) as channel:
            reply: DescribeFleetResponse = SchedulerStub(channel).DescribeFleet(DescribeFleetRequest(), timeout=10)
        return reply

    def wait_ready(self) -> None:
        self.wait_for_line(r"is ready after [0-9.]+ s\. Ask it something", timeout_s=START_TIMEOUT_S)

    def wait_for_line(self, pattern: str, *, since: int = 0, timeout_s: float = 60.0) -> None:
        """Returns when a line after the first `since` ones matches."""

        def matches() -> bool:
            return any(re.search(pattern, line) for line in self._lines[since:])

        with self._changed:
            self._changed.wait_for(lambda: matches() or self._ended, timeout_s)
        assert matches(), f"no line like {pattern!r} in:\n{self.output}"

    def descendants(self) -> list[psutil.Process]:
        """Every process of the stack but `headrace up` itself."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill_member(self, name: str) -> None:
        """kill -9, then waits until `headrace up` has it ready again."""
        since = self.lines_so_far
        os.kill(self.pid_of(name), signal.SIGKILL)
        self.wait_for_line(rf"^{name} +ended by SIGKILL, restarting", since=since)
        self.wait_for_line(rf"^{name} +ready on", since=since, timeout_s=START_TIMEOUT_S)

    def wait_ended(self) -> int:
        """The exit status, and all lines are read."""
        status = self.process.wait(timeout=90)
        self._reader.join()
        return status

    def kill(self) -> None:
        """For the end of a test: nothing stays, whatever happened."""
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
