import pytest

from headrace.v1.scheduler_pb2 import AttemptReport, Placement
from services.gateway.links.witness import Witness

BEGAN, FINISHED = AttemptReport.EVENT_BEGAN, AttemptReport.EVENT_FINISHED
FAILED, STALLED = AttemptReport.EVENT_FAILED, AttemptReport.EVENT_STALLED
WITHDRAWN = AttemptReport.EVENT_WITHDRAWN


class Told(list[AttemptReport]):
    """What a witness has told, by a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 50.0
        self.witness = Witness("r", self.append, lambda: self.now)

    def run(self, worker: str, attempt: int, *, watched: bool = False, probe: bool = False) -> Witness:
        placement = Placement(worker_id=worker, worker_incarnation=f"{worker}1", watched=watched, probe=probe)
        self.witness.placed(placement, attempt)
        return self.witness

    def brief(self) -> list[tuple[str, int, int]]:
        return [(report.worker_id, report.attempt, report.event) for report in self]


@pytest.fixture
def told() -> Told:
    return Told()


def test_an_ordinary_request_says_nothing(told: Told) -> None:
    witness = told.run("a", 1)
    witness.began()
    witness.withdrawn()
    told.run("b", 2).finished()
    assert told == []


def test_a_failure_is_told_once_the_request_has_ended_well_elsewhere(told: Told) -> None:
    told.run("a", 1).failed(stalled=False)
    told.now += 2
    told.run("b", 2).failed(stalled=True)
    told.now += 3
    witness = told.run("c", 3)
    witness.began()
    assert told == []
    witness.finished()
    assert told.brief() == [("a", 1, FAILED), ("b", 2, STALLED)]
    assert [report.age_ms for report in told] == [5000, 3000]
    assert [report.worker_incarnation for report in told] == ["a1", "b1"]
    assert not any(report.probe for report in told)


def test_a_request_that_fails_everywhere_blames_nobody(told: Told) -> None:
    for attempt, worker in enumerate("abc", 1):
        told.run(worker, attempt).failed(stalled=False)
    assert told == []


def test_a_worker_on_which_it_ended_well_in_the_end_is_not_blamed(told: Told) -> None:
    told.run("a", 1).failed(stalled=False)
    told.run("b", 2).failed(stalled=False)
    told.run("a", 3).finished()
    assert told.brief() == [("b", 2, FAILED)]


def test_a_watched_attempt_tells_of_its_good_end_alone(told: Told) -> None:
    told.run("a", 1, watched=True).withdrawn()
    witness = told.run("a", 2, watched=True)
    witness.began()
    witness.finished()
    assert told.brief() == [("a", 2, FINISHED)]


def test_a_probe_is_answered_once_at_its_first_token(told: Told) -> None:
    witness = told.run("a", 1, watched=True, probe=True)
    witness.began()
    witness.began()
    witness.failed(stalled=False)
    assert told.brief() == [("a", 1, BEGAN)]
    assert told[0].probe
    told.run("b", 2).finished()
    assert told.brief()[1:] == [("a", 1, FAILED)], "after its first token it is an attempt like any other"
    assert not told[1].probe


@pytest.mark.parametrize("stalled", [False, True])
def test_a_probe_that_fails_is_answered_at_once_and_not_again(told: Told, stalled: bool) -> None:
    told.run("a", 1, watched=True, probe=True).failed(stalled=stalled)
    told.run("b", 2).finished()
    assert told.brief() == [("a", 1, STALLED if stalled else FAILED)]
    assert told[0].probe


def test_a_probe_that_says_nothing_of_its_worker_is_withdrawn(told: Told) -> None:
    witness = told.run("a", 1, watched=True, probe=True)
    witness.withdrawn()
    witness.withdrawn()
    assert told.brief() == [("a", 1, WITHDRAWN)]
