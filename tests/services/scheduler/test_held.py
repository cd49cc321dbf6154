from headrace.v1.job_pb2 import Job
from headrace.v1.sampling_pb2 import PRIORITY_HIGH, PRIORITY_LOW, PRIORITY_NORMAL
from headrace.v1.scheduler_pb2 import PlacementRequest
from services.common.redis.queue import FIRST_ATTEMPT, QueuedJob
from services.scheduler.held import HeldJob, HeldJobs, Where


def queued(request_id: str, entry_id: str, priority: int = PRIORITY_NORMAL, **fields: object) -> HeldJob:
    job = Job(request_id=request_id, priority=priority, choices=2, **fields)  # type: ignore[arg-type]
    return HeldJob.from_queue(QueuedJob(entry_id, job))


def asked(request_id: str, entry_id: str, reason: int, priority: int = PRIORITY_NORMAL) -> HeldJob:
    job = Job(request_id=request_id, priority=priority, choices=2)
    return HeldJob.from_request(PlacementRequest(job=job, queue_entry_id=entry_id, reason=reason, attempt=3))


def drained(held: HeldJobs) -> list[str]:
    order = []
    while (first := held.first()) is not None:
        order.append(first.key[0])
        held.drop(first)
    return order


def test_order_is_replacements_then_priority_then_age() -> None:
    held = HeldJobs()
    for number, job in enumerate(
        (
            queued("low", "1-0", PRIORITY_LOW),
            queued("late", "10-0"),
            queued("early", "9-1"),
            queued("earliest", "9-0"),
            queued("high", "11-0", PRIORITY_HIGH),
            asked("busy", "8-0", PlacementRequest.REASON_BUSY),
            asked("lost", "99-0", PlacementRequest.REASON_WORKER_LOST, PRIORITY_LOW),
            asked("drained", "98-0", PlacementRequest.REASON_DRAINING),
        )
    ):
        held.add(job, now=number)
    assert drained(held) == ["drained", "lost", "high", "busy", "earliest", "early", "late", "low"]


def test_only_waiting_jobs_are_first() -> None:
    held = HeldJobs()
    a, b, c = (queued(name, f"{number}-0") for number, name in enumerate("abc"))
    for job in (a, b, c):
        held.add(job, 0)
    held.offer(a, ("w",), 1)
    held.park(b, 1)
    assert held.first() is c
    assert (held.offered, held.waiting_choices, len(held)) == (1, 2, 3)
    held.add(b, 2)
    assert held.first() is b
    held.drop(a)
    assert (held.offered, len(held)) == (0, 2)


def test_jobs_that_need_not_be_alone_can_be_had_apart() -> None:
    held = HeldJobs()
    ranked = [queued("a", "1-0"), queued("b", "2-0", alone=True), queued("c", "3-0"), queued("d", "4-0", alone=True)]
    for job in reversed(ranked):
        held.add(job, 0)
    assert held.waiting_choices == 4, "of the two that need not be alone"
    assert held.first() is held.first_sociable() is ranked[0]
    held.drop(ranked[0])
    assert (held.first(), held.first_sociable()) == (ranked[1], ranked[2])
    held.offer(ranked[2], ("w",), 1)
    assert (held.first_sociable(), held.waiting_choices) == (None, 0)
    assert drained(held) == ["b", "d"]


def test_a_newer_word_on_an_attempt_replaces_the_older() -> None:
    held = HeldJobs()
    old = asked("r", "1-0", PlacementRequest.REASON_BUSY)
    held.add(old, 0)
    held.offer(old, ("w",), 1)
    new = asked("r", "1-0", PlacementRequest.REASON_BUSY)
    held.add(new, 2)
    assert not held.has(old, Where.OFFERED)
    assert (held.first(), held.offered, len(held)) == (new, 0, 1)


def test_the_first_attempt_and_the_asked_one() -> None:
    assert queued("r", "1-0").key == ("r", FIRST_ATTEMPT)
    assert asked("r", "1-0", PlacementRequest.REASON_BUSY).key == ("r", 3)
    hashes = queued("r", "1-0", block_hashes=bytes(16) + bytes([1]) * 16).shape.block_hashes
    assert list(hashes) == [bytes(16), bytes([1]) * 16]
