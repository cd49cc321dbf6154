"""What a stack's processes spend of the CPU: its workers, which compute, and the others, which control.

Knows nothing of what is done meanwhile. A process that ends within the time is not counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Self

import psutil

from toolkit.process_tree import processes_below

_WORKER = ("-m", "services.worker")


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU time (user and system) in seconds within a time, and resident memory in MiB at its end.

    `worker_*`: worker processes and what they started. `other_s`: the rest of the tree, the supervisor included.
    """

    worker_s: float
    other_s: float
    worker_rss_mib: float
    # other_s of both; None where the tree has no worker process, or none of them did anything.
    control_plane_share: float | None


class CpuMeter:
    """Measures a process tree between `with` and its end; then `use` has the figures."""

    def __init__(self, root_pid: int) -> None:
        self._root = psutil.Process(root_pid)
        self._before: dict[psutil.Process, float] = {}
        self.use: CpuUse | None = None

    def __enter__(self) -> Self:
        self._before = {process: cpu_s(process) for process in processes_below(self._root)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        everything = set(processes_below(self._root))
        workers = _workers(everything)
        worker_s, other_s = self._spent_s(workers), self._spent_s(everything - workers)
        self.use = CpuUse(
            worker_s=worker_s,
            other_s=other_s,
            worker_rss_mib=sum(rss_bytes(process) for process in workers) / 2**20,
            control_plane_share=other_s / (worker_s + other_s) if worker_s else None,
        )

    def _spent_s(self, processes: Iterable[psutil.Process]) -> float:
        # max: one that ends just now reads as zero.
        return sum(max(0.0, cpu_s(process) - self._before.get(process, 0.0)) for process in processes)


def _workers(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    leaders = [process for process in processes if is_worker_command(_command(process))]
    return {process for leader in leaders for process in processes_below(leader)}


def is_worker_command(command: list[str]) -> bool:
    """True for `python -m services.worker`, with whatever options."""
    return _WORKER in pairwise(command)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def cpu_s(process: psutil.Process) -> float:
    """CPU time so far, user and system, in seconds; 0 once it has ended."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def rss_bytes(process: psutil.Process) -> int:
    """Resident memory; 0 once it has ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
