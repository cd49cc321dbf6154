"""Memory that is provided ahead of its use: looked at through the system's own account of what is there."""

import ctypes
import mmap
import os

import numpy as np
import numpy.typing as npt
import pytest

from services.worker.engine.kernels import touch_ahead
from services.worker.engine.kernels.touch_ahead import TouchAhead

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def memory() -> npt.NDArray[np.uint8]:
    """32 MiB from the system itself, which nobody has touched: an allocator may hand out what somebody has."""
    return np.frombuffer(mmap.mmap(-1, 32 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def present(memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """By page of the system, whether it is there."""
    first = -(-memory.ctypes.data // PAGE) * PAGE
    pages = (memory.ctypes.data + len(memory) - first) // PAGE
    found = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(pages * PAGE), found) == 0
    return np.frombuffer(found, np.uint8) & 1 == 1


def test_memory_is_there_ahead_of_its_use_and_no_further(memory: npt.NDArray[np.uint8]) -> None:
    ahead = TouchAhead(memory, 8 * MIB)
    assert not present(memory).any()
    ahead.reach(0)
    ahead.wait()
    assert present(memory)[: 8 * MIB // PAGE - 1].all()
    assert not present(memory)[10 * MIB // PAGE :].any(), "whole large pages at most"
    ahead.reach(12 * MIB)
    ahead.wait()
    assert present(memory)[: 20 * MIB // PAGE - 1].all()


def test_it_does_not_go_ahead_for_a_little(memory: npt.NDArray[np.uint8]) -> None:
    ahead = TouchAhead(memory, 8 * MIB)
    ahead.reach(0)
    ahead.wait()
    there = present(memory).sum()
    ahead.reach(MIB)
    ahead.wait()
    assert present(memory).sum() == there


def test_what_memory_holds_stays_and_all_of_it_is_reached(memory: npt.NDArray[np.uint8]) -> None:
    memory[:MIB] = np.arange(MIB, dtype=np.uint8)
    memory[-1] = 7
    ahead = TouchAhead(memory, 8 * MIB)
    for used in range(0, len(memory) + 1, 4 * MIB):
        ahead.reach(used)
        ahead.wait()
    assert present(memory).all()
    assert (memory[:MIB] == np.arange(MIB, dtype=np.uint8)).all()
    assert memory[-1] == 7
    assert not memory[MIB:-1].any()


def test_a_system_that_cannot_is_not_asked_twice(
    memory: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(touch_ahead, "_populate", lambda: lambda start, _: bool(asked.append(start)))
    ahead = TouchAhead(memory, 8 * MIB)
    for used in (0, 16 * MIB):
        ahead.reach(used)
        ahead.wait()
    assert asked == [memory.ctypes.data]
    assert not present(memory).any()
