"""When a worker tells its schedulers how it does."""

import math
from dataclasses import replace

import pytest

from headrace.v1.scheduler_pb2 import WORKER_ROLE_BOTH, WORKER_ROLE_DECODE, PlacementKey
from services.worker.capacity import Room
from services.worker.scheduler_links import Settled, WorkerLoad, wait_for

LAST = WorkerLoad(
    step=7,
    running=2,
    waiting=0,
    free_blocks=50,
    pending_prefill_tokens=0,
    free=Room(2, 50, 64),
    draining=False,
    prefill_tokens_per_s=1000.0,
    role=WORKER_ROLE_BOTH,
    prefix_queried_tokens=0,
    prefix_hit_tokens=0,
)


def wait_s(free: Room, settled: int = 0, prompt_tokens: int = 0, schedulers: int = 1, last: Room = LAST.free) -> float:
    keys = [PlacementKey(request_id=str(number)) for number in range(settled)]
    load = replace(LAST, step=8, free_blocks=40, free=free)
    return wait_for(load, replace(LAST, free=last), Settled(keys, prompt_tokens), schedulers)


def test_what_only_grows_is_no_news() -> None:
    assert wait_for(replace(LAST, step=8, prefix_queried_tokens=5), LAST, Settled(), 1) == math.inf


def test_what_it_is_to_be_used_for_and_new_shares_are_told_at_once() -> None:
    assert wait_for(LAST, None, Settled(), 1) == 0
    assert wait_for(replace(LAST, draining=True), LAST, Settled(), 1) == 0
    assert wait_for(replace(LAST, role=WORKER_ROLE_DECODE), LAST, Settled(), 1) == 0


@pytest.mark.parametrize(
    ("free", "settled", "at_once"),
    [
        (2, 0, False),  # it has only used more blocks
        (1, 1, False),  # one began: its scheduler has counted it
        (0, 2, False),
        (3, 0, True),  # one ended
        (2, 1, True),  # one began and one ended, or one was refused
        (1, 2, True),
        (0, 1, False),  # one of two choices began
    ],
)
def test_room_that_no_scheduler_counts_on_is_told_at_once(free: int, settled: int, at_once: bool) -> None:
    waits = wait_s(Room(free, 40, 64), settled)
    assert (waits == 0) is at_once and waits < 1


def test_more_room_than_plenty_can_wait() -> None:
    last = Room(40, 50, 8192)
    assert wait_s(Room(40, 40, 8192), 20, 2000, last=last) > 0
    assert wait_s(Room(40, 40, 8192), 30, 2000, last=last) == 0, "of 40 sequences, 10 are left"
    assert wait_s(Room(40, 40, 8192), 20, 5000, last=last) == 0, "so long prompts that few more would fit"
    assert wait_s(Room(40, 40, 8192), 20, 2000, schedulers=2, last=last) == 0, "10 are left to each"
