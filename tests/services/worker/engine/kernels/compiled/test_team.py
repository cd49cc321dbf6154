"""Threads that share out phases: every item done, none before its phase, step after step, whoever is held up."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.machine import atomic_load, atomic_replace, atomic_store, longs, pause
from services.worker.engine.kernels.compiled.team import (
    await_start,
    done,
    finish,
    leave,
    new_control,
    next_item,
    start,
    stop,
)
from tests.services.worker.engine.kernels.compiled.calling import compiled

PHASES = 4
NOBODY = -1
Words = npt.NDArray[np.int64]


@njit(nogil=True, error_model="numpy")
def relay(control: int, members: int, rank: int, parts: int, items: int, sums: int, held_up: int, over: int) -> None:
    """Each item of a phase adds up all of the phase before; `sums` is the address of int64 [PHASES][items], behind
    which as many count how often each item was done.

    The thread of rank `held_up` stops within the first item that it has of each step, until the word at `over` is set.
    """
    first = True
    for phase in range(PHASES):
        before = longs(sums + 8 * (phase - 1) * items, items)
        item = next_item(control, members, rank, parts, items)
        while item >= 0:
            total = 1
            if phase:
                total = 0
                for each in before:
                    total += each
            while first and rank == held_up and atomic_load(over) == 0:
                pause()
            first = False
            atomic_store(sums + 8 * (phase * items + item), total)
            times = sums + 8 * ((PHASES + phase) * items + item)
            before_times = atomic_load(times)
            while not atomic_replace(times, before_times, before_times + 1):
                before_times = atomic_load(times)
            done(control, members, rank, item)
            item = next_item(control, members, rank, parts, items)
    if rank != held_up:
        atomic_store(over, 1)


def make_step(_: Isa) -> Callable[..., None]:
    def step(
        rank: int, members: int, control: int, helping: int, parts: int, items: int, sums: int, held_up: int, over: int
    ) -> None:
        if rank == 0:
            start(control, members, helping)
            relay(control, members, rank, parts, items, sums, held_up, over)
            finish(control, members)
            return
        while await_start(control, rank):
            relay(control, members, rank, parts, items, sums, held_up, over)
            leave(control, rank)

    return step


def make_stop(_: Isa) -> Callable[..., None]:
    def end(members: int, control: int) -> None:
        stop(control, members)

    return end


@contextmanager
def team(members: int, *arguments: Any, present: int | None = None) -> Iterator[Callable[[], None]]:
    """A function that does one step with helpers, of which only the first `present` members have a thread."""
    step, control = compiled(make_step), new_control(members, 64)
    helpers = [
        threading.Thread(target=step, args=(rank, members, control, *arguments))
        for rank in range(1, members if present is None else present)
    ]
    for helper in helpers:
        helper.start()
    yield lambda: step(0, members, control, *arguments)
    compiled(make_stop)(members, control)
    for helper in helpers:
        helper.join()


def room_for(items: int) -> Words:
    return np.zeros((2 * PHASES, items), np.int64)


def assert_summed(words: Words, *, helping: int) -> None:
    sums, times = words[:PHASES], words[PHASES:]
    assert (sums == sums.shape[1] ** np.arange(PHASES)[:, None]).all()
    assert (times >= 1).all() if helping else (times == 1).all()


@pytest.mark.parametrize("members", [1, 2, 5])
@settings(max_examples=20, deadline=None)
@given(helping=st.booleans(), parts=st.integers(1, 5), items=st.integers(1, 40), steps=st.integers(1, 20))
def test_items_are_done_after_all_of_the_phase_before(
    members: int, helping: bool, parts: int, items: int, steps: int
) -> None:
    sums, over = room_for(items), np.zeros(1, np.int64)
    with team(members, int(helping), min(parts, members), items, sums, NOBODY, over) as step:
        for _ in range(steps):
            sums[:] = 0
            step()
            assert_summed(sums, helping=helping)


@pytest.mark.parametrize("held_up", [0, 1, 2])
@pytest.mark.parametrize("parts", [1, 3])
def test_others_do_what_a_thread_was_held_up_at(held_up: int, parts: int) -> None:
    """It goes on only when another has come to the end of the step: nobody would, if all waited for it."""
    for items in (3, 40):
        sums, over = room_for(items), np.zeros(1, np.int64)
        with team(3, 1, parts, items, sums, held_up, over) as step:
            for _ in range(50):
                sums[:], over[0] = 0, 0
                step()
                assert_summed(sums, helping=1)


@pytest.mark.parametrize("helping", [0, 1])
def test_a_thread_that_does_not_come_is_not_waited_for(helping: int) -> None:
    sums, over = room_for(7), np.zeros(1, np.int64)
    with team(4, helping, 4, 7, sums, NOBODY, over, present=2) as step:
        for _ in range(20):
            sums[:] = 0
            step()
            assert_summed(sums, helping=helping)
