"""Threads that share out phases: every item once, none before its phase, step after step."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.machine import atomic_add, longs
from services.worker.engine.kernels.compiled.team import await_start, claim, meet, new_control, start, stop
from tests.services.worker.engine.kernels.compiled.calling import compiled

PHASES = 4


@njit(nogil=True, error_model="numpy")
def relay(control: int, members: int, rank: int, groups: int, items: int, sums: int) -> None:
    """Each item of a phase adds up all of the phase before; `sums` is the address of int64 [PHASES][items]."""
    for phase in range(PHASES):
        before = longs(sums + 8 * (phase - 1) * items, items)
        for turn in range(groups):
            group = (rank + turn) % groups
            item = group + groups * claim(control, group)
            while item < items:
                total = 1
                if phase:
                    total = 0
                    for each in before:
                        total += each
                atomic_add(sums + 8 * (phase * items + item), total)
                item = group + groups * claim(control, group)
        meet(control, members)


def make_step(_: Isa) -> Callable[..., None]:
    def step(rank: int, members: int, control: int, groups: int, items: int, sums: int) -> None:
        if rank == 0:
            start(control, members)
            relay(control, members, rank, groups, items, sums)
            return
        while await_start(control, rank):
            relay(control, members, rank, groups, items, sums)

    return step


def make_stop(_: Isa) -> Callable[..., None]:
    def end(members: int, control: int) -> None:
        stop(control, members)

    return end


@pytest.mark.parametrize("members", [1, 2, 5])
@settings(max_examples=20, deadline=None)
@given(groups=st.integers(1, 5), items=st.integers(1, 40), steps=st.integers(1, 20))
def test_items_are_done_once_each_after_all_of_the_phase_before(
    members: int, groups: int, items: int, steps: int
) -> None:
    groups = min(groups, members)
    step, control, sums = compiled(make_step), new_control(members), np.zeros((PHASES, items), np.int64)
    helpers = [
        threading.Thread(target=step, args=(rank, members, control, groups, items, sums)) for rank in range(1, members)
    ]
    for helper in helpers:
        helper.start()
    for _ in range(steps):
        sums[:] = 0
        step(0, members, control, groups, items, sums)
        assert (sums == items ** np.arange(PHASES)[:, None]).all()
    compiled(make_stop)(members, control)
    for helper in helpers:
        helper.join()
