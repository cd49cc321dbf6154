"""A process and all that it started, stopped with SIGSTOP and let go on with SIGCONT together."""

import asyncio
import contextlib

import psutil

_LOOK_EVERY_S = 0.01
# A process that waits for a disk stops only when the disk has answered.
_STOP_DEADLINE_S = 10.0
_AT_REST = {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}


class NotStopped(Exception):
    """A process runs on in spite of SIGSTOP; the message names it."""


class ProcessTree:
    """The tree below a process that runs now. Raises psutil.NoSuchProcess at construction if it does not."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        # Also those whose parents have ended since, and which are in no tree of ours any more.
        self._signalled: set[psutil.Process] = set()

    @property
    def pid(self) -> int:
        return self._root.pid

    async def stop(self) -> None:
        """Returns when every process of the tree has stopped or ended. Raises NotStopped."""
        try:
            async with asyncio.timeout(_STOP_DEADLINE_S):
                # Again and again: one that does not rest yet may start another.
                while running := [process for process in processes_below(self._root) if not _rests(process)]:
                    for process in running:
                        self._signalled.add(process)
                        with contextlib.suppress(psutil.NoSuchProcess):
                            process.suspend()
                    await asyncio.sleep(_LOOK_EVERY_S)
        except TimeoutError:
            raise NotStopped(f"process {running[0].pid} did not stop within {_STOP_DEADLINE_S:.0f} s") from None

    def go_on(self) -> None:
        """Lets everything that was stopped run again, children before their parents, who may be watching them."""
        for process in sorted(self._signalled, key=lambda process: process.create_time(), reverse=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self._signalled.clear()


def processes_below(root: psutil.Process) -> list[psutil.Process]:
    """The process itself and all its descendants; none if it has ended."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _rests(process: psutil.Process) -> bool:
    try:
        return process.status() in _AT_REST
    except psutil.NoSuchProcess:
        return True
