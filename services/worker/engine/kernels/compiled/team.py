"""Threads that run one compiled function together, phase after phase, without Python's lock.

A phase's work is a number of items that threads claim by an atomic counter, so that a thread that the system holds up
takes fewer; a barrier ends the phase. Items may be in several groups, each with a counter of its own: a thread takes
those of its own group first, in order, so that what it works on is in its own cache already or lies in one run of
memory, and then helps others. Between steps the helpers wait on a semaphore and take no processor time.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from services.worker.engine.kernels.compiled.machine import (
    SEMAPHORE_BYTES,
    atomic_add,
    atomic_load,
    longs,
    pause,
    semaphore_post,
    semaphore_wait,
    yield_processor,
)

_LINE = 8  # int64s in a cache line: what threads write often lies apart
_ARRIVED, _GENERATION, _STOPPED, _MEMBERS = 0, _LINE, 2 * _LINE, 3 * _LINE
_MEMBER = _LINE + SEMAPHORE_BYTES // 8 + _LINE  # int64s of each member: its group's counter, its semaphore
# A barrier is mostly met within microseconds. Then the processor is left to whoever needs it: another thread of the
# team may be waiting for just that.
_SPINS = 100


def new_control(members: int) -> npt.NDArray[np.int64]:
    """The shared words of a team: barrier, a counter per group, semaphores, all zero (as sem_init leaves one). There
    are at most as many groups as members.

    The functions of this module take the address of its first.
    """
    return np.zeros(_MEMBERS + members * _MEMBER, np.int64)


@njit(nogil=True, error_model="numpy")
def claim(control: int, group: int) -> int:
    """The number, from 0, of the item of a phase's group that is now this thread's; it may lie beyond the last item."""
    return atomic_add(_counter(control, group), 1)


@njit(nogil=True, error_model="numpy")
def meet(control: int, members: int) -> None:
    """Returns when all members have called it, which ends the phase: items of the next one are counted from 0 again."""
    arrived, generation = control + 8 * _ARRIVED, control + 8 * _GENERATION
    before = atomic_load(generation)
    if atomic_add(arrived, 1) == members - 1:
        for group in range(members):
            longs(_counter(control, group), 1)[0] = 0
        atomic_add(arrived, -members)
        atomic_add(generation, 1)
        return
    spins = 0
    while atomic_load(generation) == before:
        spins += 1
        if spins < _SPINS:
            pause()
        else:
            yield_processor()


@njit(nogil=True, error_model="numpy")
def start(control: int, members: int) -> None:
    """Begins a step: wakes the helpers."""
    for rank in range(1, members):
        semaphore_post(_semaphore(control, rank))


@njit(nogil=True, error_model="numpy")
def await_start(control: int, rank: int) -> bool:
    """Waits for the next step; False when there will be none."""
    while semaphore_wait(_semaphore(control, rank)) != 0:  # a signal's handler ended the wait
        pass
    return atomic_load(control + 8 * _STOPPED) == 0


@njit(nogil=True, error_model="numpy")
def stop(control: int, members: int) -> None:
    """Ends the helpers that wait for a step."""
    atomic_add(control + 8 * _STOPPED, 1)
    for rank in range(1, members):
        semaphore_post(_semaphore(control, rank))


@njit(nogil=True, error_model="numpy")
def _counter(control: int, group: int) -> int:
    return control + 8 * (_MEMBERS + group * _MEMBER)


@njit(nogil=True, error_model="numpy")
def _semaphore(control: int, rank: int) -> int:
    return control + 8 * (_MEMBERS + rank * _MEMBER + _LINE)
