"""The folder of one run of a stack: its logs, its Redis data, and a state file that other commands read.

A run holds a lock on a file of its folder for as long as it lives, so that whoever reads the folder can tell a running
stack from what a dead one left behind. The folders of the last few runs are kept for their logs. Only their user can
read them: the state file has the URL of Redis, which may hold a password.
"""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from services.common.tls import FrontCert, TlsFiles

_STATE_FILE = "stack.json"
_LOCK_FILE = "lock"
_KEPT_DEAD_RUNS = 5


@dataclass(frozen=True, slots=True)
class RunningProcess:
    """One process of a stack, as the state file tells it. `pid` is None between an end and the next start."""

    name: str
    service: str
    address: str
    metrics_url: str | None
    log: str
    state: str
    pid: int | None
    started_unix_s: float


@dataclass(frozen=True, slots=True)
class RunningStack:
    """What the state file holds."""

    pid: int
    directory: str
    http_url: str
    grpc_address: str
    scheduler_address: str
    redis_url: str
    processes: tuple[RunningProcess, ...]
    # What the gateways show; None: their fronts are plain.
    front_cert: FrontCert | None = None
    # What a command shows to the services; None: connections between them are plain.
    tls: TlsFiles | None = None


class RunDirectory:
    """This run's folder, locked until this process ends. `path` is where logs and data go."""

    def __init__(self, runs: Path) -> None:
        self.path = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.path.mkdir(mode=0o700, parents=True)
        self._lock = (self.path / _LOCK_FILE).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        _remove_old_runs(runs)

    def log_path(self, name: str) -> Path:
        return self.path / f"{name}.log"

    def data_path(self, name: str) -> Path:
        """A folder for what a process keeps, made if it is not there."""
        path = self.path / name
        path.mkdir(exist_ok=True)
        return path

    def write_state(self, stack: RunningStack) -> None:
        """Replaces the state file, which a reader sees whole or not at all."""
        draft = self.path / f"{_STATE_FILE}.new"
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(asdict(stack), indent=1))
        draft.replace(self.path / _STATE_FILE)


def running_stacks(runs: Path) -> list[RunningStack]:
    """Stacks that run now, the oldest first."""
    return [_read_state(path) for path in _run_paths(runs) if (path / _STATE_FILE).exists() and _is_alive(path)]


class UnclearStack(Exception):
    """Which stack is meant is not clear; one sentence for the person."""


def redis_url_of(stacks: Sequence[RunningStack], given: str | None) -> str:
    """The Redis of the stack that is meant, or the given one. Raises UnclearStack."""
    urls = {given} if given else {stack.redis_url for stack in stacks}
    if not urls:
        raise UnclearStack("No stack runs here: start one with `headrace up`, or name its Redis with --redis-url.")
    if len(urls) > 1:
        shown = ", ".join(sorted(map(_without_password, urls)))
        raise UnclearStack(f"Several stacks run here: choose one with --redis-url, of {shown}.")
    return urls.pop()


def _without_password(url: str) -> str:
    """The URL as it may be shown. A password may stand before the host or in the query; rather too much is hidden."""
    url = re.sub(r"(password=)[^&]*", r"\1***", url)
    return re.sub(r"(://[^:/@]*:).*(?=@)", r"\1***", url)


def _read_state(path: Path) -> RunningStack:
    state = json.loads((path / _STATE_FILE).read_text())
    processes = tuple(RunningProcess(**process) for process in state.pop("processes"))
    front_cert, tls = state.pop("front_cert", None), state.pop("tls", None)
    return RunningStack(
        **state,
        processes=processes,
        front_cert=front_cert and FrontCert(**front_cert),
        tls=tls and TlsFiles(**tls),
    )


def _remove_old_runs(runs: Path) -> None:
    dead = [path for path in _run_paths(runs) if not _is_alive(path)]
    for path in dead[:-_KEPT_DEAD_RUNS]:
        shutil.rmtree(path, ignore_errors=True)


def _run_paths(runs: Path) -> Sequence[Path]:
    """By the time of their start, which leads their names."""
    return sorted(path for path in runs.glob("*") if path.is_dir())


def _is_alive(path: Path) -> bool:
    lock: IO[str]
    try:
        with (path / _LOCK_FILE).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
