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


def wait_s(free: Room, settled: Settled | None = None, schedulers: int = 1, last: Room = LAST.free) -> float:
    load = replace(LAST, step=8, free_blocks=40, free=free)
    return wait_for(load, replace(LAST, free=last), settled or Settled(), schedulers)


def began(requests: int, *, choices: int = 1, blocks: int = 0, tokens: int = 0) -> Settled:
    keys = [PlacementKey(request_id=str(number)) for number in range(requests)]
    return Settled(keys, requests * choices, requests * blocks, requests * tokens)


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
    ],
)
def test_room_that_no_scheduler_counts_on_is_told_at_once(free: int, settled: int, at_once: bool) -> None:
    waits = wait_s(Room(free, 40, 64), began(settled))
    assert (waits == 0) is at_once and waits < 1


def test_each_choice_takes_room() -> None:
    last = Room(4, 50, 64)
    assert wait_s(Room(0, 40, 64), began(1, choices=4), last=last) > 0
    assert wait_s(Room(3, 40, 64), began(1, choices=4), last=last) == 0, "three of others have ended"


def test_more_room_than_plenty_can_wait() -> None:
    last = free = Room(40, 50, 8192)
    assert wait_s(free, began(20, tokens=100), last=last) > 0
    assert wait_s(free, began(30, tokens=100), last=last) == 0, "of 40 sequences, 10 are left"
    assert wait_s(free, began(20, tokens=250), last=last) == 0, "so long prompts that few more would fit"
    assert wait_s(free, began(20, blocks=2), last=last) == 0, "few more blocks than were taken"
    assert wait_s(Room(41, 80, 8192), last=Room(40, 3, 8192)) == 0, "the blocks that a long prompt waits for"
    assert wait_s(free, began(10), schedulers=2, last=last) == 0, "10 are left to the one that placed them"
