"""Has the system provide memory a little ahead of its use.

Memory that was never touched is cleared by the system when it is, and on a virtual machine perhaps fetched from the
host: 2 MB take between 0.2 and 5 ms, in which the thread that touched it waits, and all that wait for that thread.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

AHEAD_BYTES = 256 << 20
_PIECE_BYTES = 2 << 20  # a large page
_NICENESS = 5  # of the thread: the others come first, and yet do not wait long for a lock that it may hold
_MADV_POPULATE_WRITE = 23  # of Linux 5.14 and newer


class TouchAhead:
    """Memory that is used from its start on, and never given back. One thread at a time calls this."""

    def __init__(self, memory: npt.NDArray[np.uint8], ahead_bytes: int = AHEAD_BYTES) -> None:
        self._memory = memory
        self._ahead_bytes = ahead_bytes
        self._touched = 0
        self._thread: threading.Thread | None = None

    def reach(self, used: int) -> None:
        """The first `used` bytes are in use. Has a thread go ahead of that, if it is time to; never raises."""
        size = len(self._memory)
        target = min(used + self._ahead_bytes, size)
        due = target - self._touched >= (self._ahead_bytes // 4 if target < size else _PIECE_BYTES)
        if due and not (self._thread and self._thread.is_alive()):
            thread = threading.Thread(target=self._go_ahead, args=(target,), name="touch-ahead", daemon=True)
            with contextlib.suppress(RuntimeError):  # the system grants no more threads
                thread.start()
                self._thread = thread

    def wait(self) -> None:
        """Returns when nothing is under way."""
        if self._thread is not None:
            self._thread.join()

    def _go_ahead(self, target: int) -> None:
        with contextlib.suppress(OSError):  # a system without the right to
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        populate, address = _populate(), self._memory.ctypes.data
        while self._touched < target:
            start = address + self._touched
            end = min((start // _PIECE_BYTES + 1) * _PIECE_BYTES, address + target)
            if not populate(start, end):
                self._touched = len(self._memory)  # not on this system, then
                return
            self._touched = end - address


def _populate() -> Callable[[int, int], bool]:
    """`populate(start, end)` of addresses: has the system provide the whole pages between. What they hold stays."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = os.sysconf("SC_PAGE_SIZE")

    def populate(start: int, end: int) -> bool:
        first, last = -(-start // page) * page, end // page * page
        return last <= first or madvise(first, last - first, _MADV_POPULATE_WRITE) == 0

    return populate
