"""Threads that run one compiled function together, phase after phase, without Python's lock.

A phase's work is a number of items that threads claim by atomic counters, so that a thread that the system holds up
takes fewer; when all are done, the next phase begins. Items may be in several parts, each with a counter of its own: a
thread takes those of its own part first, in order, so that what it works on is in its own cache already or lies in one
run of memory, and then those of others.

Where a step allows it, nobody waits long for an item that a thread has claimed and was held up at: whoever waits does
it, too, and goes on ("helping", Herlihy 1991). Only at the step's end all wait for a thread that is within an item.
Such an item writes the same numbers again, perhaps phases later, when the first thread goes on with it: all that a
phase reads or writes must stay as it is until the step ends.

Phases are numbered on from step to step. Words that belong to one carry its number: what a late thread still does to
them is told from what the present phase does. Between steps the helpers wait on a semaphore and take no processor time.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from services.worker.engine.kernels.compiled.machine import (
    SEMAPHORE_BYTES,
    atomic_load,
    atomic_replace,
    atomic_store,
    longs,
    pause,
    semaphore_post,
    semaphore_wait,
    yield_processor,
)

_LINE = 8  # int64s in a cache line: what threads write often lies apart
_PHASE, _ARRIVED, _STOPPED, _STEP, _MEMBERS = (_LINE * n for n in range(5))  # _STEP: first phase, may they help
# Of each member: the counter of its part; whether it takes part in the step; its own notes; its semaphore.
_COUNTER, _STATE, _NOTES, _SEMAPHORE = (_LINE * n for n in range(4))
_MEMBER = _SEMAPHORE + SEMAPHORE_BYTES // 8 + _LINE
# Notes: the phase; parts left behind; items done of those claimed; whether all are claimed and it has told how many it
# did; turns of its wait; items that it knows to be done.
_AT, _TURN, _COUNT, _TOLD, _WAITED, _SEEN = range(6)
_AWAY, _CALLED, _HERE = range(3)
_TAG = 20  # bits of a word below the number of its phase: so many items, and phases for a century
_BEYOND = 1 << _TAG
# A phase mostly ends within microseconds of a thread's last item. Then it does what others were held up at, or leaves
# the processor to whoever needs it: another thread of the team may be waiting for just that.
_SPINS = 100


def new_control(members: int, items: int = 0) -> npt.NDArray[np.int64]:
    """The shared words of a team, all zero (as sem_init leaves a semaphore). A phase has no more parts than members
    and, in a step whose members help each other, no more than `items` items.

    The functions of this module take the address of its first.
    """
    return np.zeros(_MEMBERS + members * _MEMBER + items, np.int64)


@njit(nogil=True, error_model="numpy")
def phase_of(control: int, rank: int) -> int:
    """The number of the thread's phase, which no other phase of the team ever has."""
    return _notes(control, rank)[_AT]


@njit(nogil=True, error_model="numpy")
def claim(control: int, rank: int, part: int) -> int:
    """The number, from 0, of the item of a part that is now this thread's; it may lie beyond the last item."""
    phase, counter = _notes(control, rank)[_AT], _member(control, part) + 8 * _COUNTER
    count = _add_tagged(counter, phase, 1)
    return count - 1 if count > 0 else _BEYOND


@njit(nogil=True, error_model="numpy")
def done(control: int, members: int, rank: int, item: int) -> None:
    """The thread has done what it claimed, or what it helped with. `item`: its number in the phase."""
    notes = _notes(control, rank)
    if not notes[_TOLD]:
        notes[_COUNT] += 1
    if _helping(control):
        atomic_store(_flags(control, members) + 8 * item, notes[_AT] + 1)


@njit(nogil=True, error_model="numpy")
def next_item(control: int, members: int, rank: int, parts: int, items: int) -> int:
    """The item that the thread is to do next, and say done; -1 when the phase is over. Of `parts` parts, number n is in
    part n % parts.
    """
    notes = _notes(control, rank)
    while notes[_TURN] < parts:
        part = (rank + notes[_TURN]) % parts
        item = part + parts * claim(control, rank, part)
        if item < items:
            return item
        notes[_TURN] += 1
    return help_out(control, members, rank, items)


@njit(nogil=True, error_model="numpy")
def help_out(control: int, members: int, rank: int, items: int) -> int:
    """When all `items` are claimed: one that is still to be done; -1 when the phase is over, and the next one begins
    for this thread. Must be called until then.
    """
    notes = _notes(control, rank)
    phase = notes[_AT]
    if not notes[_TOLD]:
        notes[_TOLD] = 1
        if _add_tagged(control + 8 * _ARRIVED, phase, notes[_COUNT]) == items:
            atomic_replace(control + 8 * _PHASE, phase, phase + 1)
    while atomic_load(control + 8 * _PHASE) == phase:
        notes[_WAITED] += 1
        if notes[_WAITED] < _SPINS:
            pause()
        elif _helping(control):
            item = _undone(control, members, notes, items)
            if item >= 0:
                return item
            atomic_replace(control + 8 * _PHASE, phase, phase + 1)
        else:
            yield_processor()
    notes[:] = 0
    notes[_AT] = phase + 1
    return -1


@njit(nogil=True, error_model="numpy")
def start(control: int, members: int, helping: bool) -> None:
    """Begins a step, for the thread of rank 0: wakes the others. `helping`: whether items may be done twice."""
    step = longs(control + 8 * _STEP, 2)
    step[0], step[1] = atomic_load(control + 8 * _PHASE), helping
    _begin(control, 0)
    for rank in range(1, members):
        atomic_store(_member(control, rank) + 8 * _STATE, _CALLED)
        semaphore_post(_member(control, rank) + 8 * _SEMAPHORE)


@njit(nogil=True, error_model="numpy")
def finish(control: int, members: int) -> None:
    """Ends a step, for the thread of rank 0, whose phases are over: returns when no other thread is in it any more.
    One that has not woken up yet is not waited for.
    """
    for rank in range(1, members):
        state, spins = _member(control, rank) + 8 * _STATE, 0
        atomic_replace(state, _CALLED, _AWAY)
        while atomic_load(state) != _AWAY:
            spins += 1
            if spins < _SPINS:
                pause()
            else:
                yield_processor()


@njit(nogil=True, error_model="numpy")
def await_start(control: int, rank: int) -> bool:
    """Waits for the next step, which the thread must `leave`; False when there will be none."""
    state = _member(control, rank) + 8 * _STATE
    while True:
        while semaphore_wait(_member(control, rank) + 8 * _SEMAPHORE) != 0:  # a signal's handler ended the wait
            pass
        if atomic_load(control + 8 * _STOPPED):
            return False
        if atomic_replace(state, _CALLED, _HERE):  # else the step that it was woken for is over
            _begin(control, rank)
            return True


@njit(nogil=True, error_model="numpy")
def leave(control: int, rank: int) -> None:
    """The thread touches nothing of the step any more."""
    atomic_store(_member(control, rank) + 8 * _STATE, _AWAY)


@njit(nogil=True, error_model="numpy")
def stop(control: int, members: int) -> None:
    """Ends the helpers that wait for a step."""
    atomic_store(control + 8 * _STOPPED, 1)
    for rank in range(1, members):
        semaphore_post(_member(control, rank) + 8 * _SEMAPHORE)


@njit(nogil=True, error_model="numpy")
def _begin(control: int, rank: int) -> None:
    notes = _notes(control, rank)
    notes[:] = 0
    notes[_AT] = longs(control + 8 * _STEP, 2)[0]


@njit(nogil=True, error_model="numpy")
def _undone(control: int, members: int, notes: Any, items: int) -> int:
    """The next item that nobody has done, of all of a phase; -1 if there is none."""
    flags = _flags(control, members)
    while notes[_SEEN] < items:
        if atomic_load(flags + 8 * notes[_SEEN]) != notes[_AT] + 1:
            return notes[_SEEN]
        notes[_SEEN] += 1
    return -1


@njit(nogil=True, error_model="numpy")
def _add_tagged(word: int, phase: int, amount: int) -> int:
    """Adds to a phase's count, which begins anew with the first that adds. What it is then; -1 if a later phase's."""
    while True:
        before = atomic_load(word)
        if before >> _TAG > phase:
            return -1
        after = (before if before >> _TAG == phase else phase << _TAG) + amount
        if atomic_replace(word, before, after):
            return after & (_BEYOND - 1)


@njit(nogil=True, error_model="numpy")
def _helping(control: int) -> bool:
    return longs(control + 8 * _STEP, 2)[1] != 0


@njit(nogil=True, error_model="numpy")
def _notes(control: int, rank: int) -> Any:
    return longs(_member(control, rank) + 8 * _NOTES, _SEEN + 1)


@njit(nogil=True, error_model="numpy")
def _member(control: int, rank: int) -> int:
    return control + 8 * (_MEMBERS + rank * _MEMBER)


@njit(nogil=True, error_model="numpy")
def _flags(control: int, members: int) -> int:
    """Of each item, one more than the phase in which it was done. A late thread may write an older phase over a newer
    one: then the item looks undone, and is done once more.
    """
    return control + 8 * (_MEMBERS + members * _MEMBER)
