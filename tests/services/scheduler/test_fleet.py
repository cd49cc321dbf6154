import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.v1.scheduler_pb2 import (
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    AttemptReport,
    ModelInfo,
    PlacementKey,
    Registration,
    WorkerState,
)
from headrace.v1.scheduler_pb2 import Credits as CreditsProto
from services.common.errors import InvalidRequest, NotFound
from services.scheduler.breaker import BreakerPolicy
from services.scheduler.fleet import Fleet
from services.scheduler.kv_plans import Credits

BREAKERS = BreakerPolicy(failures=2, first_backoff_s=1.0, probe_timeout_s=2.0, together_s=0.5)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def registration(id: str = "a", incarnation: str = "1", **changes: object) -> Registration:
    model = ModelInfo(name="m", max_context_tokens=2048, vocabulary_size=100, block_size=16, tokenizer_hash="t")
    registered = Registration(
        worker_id=id,
        incarnation=incarnation,
        address=f"{id}:1",
        model=model,
        kv_format="f",
        max_sequences=8,
        total_blocks=100,
    )
    for name, value in changes.items():
        target = registered.model if name in ModelInfo.DESCRIPTOR.fields_by_name else registered
        setattr(target, name, value)
    return registered


def state(sequences: int = 8, blocks: int = 100, prefill: int = 1000, **others: object) -> WorkerState:
    credits = CreditsProto(sequences=sequences, blocks=blocks, prefill_tokens=prefill)
    return WorkerState(credits=credits, **others)  # type: ignore[arg-type]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fleet(clock: Clock) -> Fleet:
    return Fleet(silence_s=3, placement_timeout_s=10, breakers=BREAKERS, clock=clock)


def test_a_worker_is_a_candidate_once_it_has_reported(fleet: Fleet) -> None:
    worker = fleet.register(registration())
    assert fleet.candidates("m") == []
    fleet.report(worker, state(running_sequences=2, waiting_sequences=1, pending_prefill_tokens=50))
    [candidate] = fleet.candidates("m")
    assert (candidate.id, candidate.credits, candidate.healthy) == ("a", Credits(8, 100, 1000), True)
    assert (candidate.sequences, candidate.pending_prefill_tokens) == (3, 50)
    assert fleet.candidates("other") == []


def test_placements_count_until_they_are_reported(fleet: Fleet) -> None:
    worker = fleet.register(registration())
    fleet.report(worker, state())
    fleet.reserve("a", ("r1", 1), Credits(1, 5, 60))
    fleet.reserve("a", ("r2", 1), Credits(2, 10, 100))
    [candidate] = fleet.candidates("m")
    assert candidate.credits == Credits(5, 85, 840)
    assert (candidate.sequences, candidate.pending_prefill_tokens) == (3, 160)
    fleet.report(worker, state(7, 95, 940, settled=[PlacementKey(request_id="r1", attempt=1)]))
    assert fleet.candidates("m")[0].credits == Credits(5, 85, 840)
    fleet.report(worker, state(7, 95, 940, settled=[PlacementKey(request_id="r2", attempt=2)]))
    assert fleet.candidates("m")[0].credits == Credits(5, 85, 840), "another attempt's word does not count"
    fleet.settle("a", ("r2", 1))
    assert fleet.candidates("m")[0].credits == Credits(7, 95, 940)


def test_a_worker_that_has_computed_no_prompt_is_taken_for_its_like(fleet: Fleet) -> None:
    fresh, other = fleet.register(registration("a")), fleet.register(registration("b", name="another"))
    fleet.report(fresh, state())
    fleet.report(other, state(prefill_tokens_per_s=9.0))
    assert fleet.candidates("m")[0].prefill_tokens_per_s == 500
    old = fleet.register(registration("c"))
    fleet.report(old, state(prefill_tokens_per_s=80.0))
    fleet.reserve("a", ("r1", 1), Credits(1, 5, 60))
    fleet.report(old, state())
    assert [one.prefill_tokens_per_s for one in fleet.candidates("m")] == [80, 80]
    fleet.report(fresh, state(prefill_tokens_per_s=90.0))
    assert fleet.candidates("m")[0].prefill_tokens_per_s == 90


def test_a_placement_nobody_reports_stops_counting(fleet: Fleet, clock: Clock) -> None:
    worker = fleet.register(registration())
    fleet.report(worker, state())
    fleet.reserve("a", ("r1", 1), Credits(8, 5, 60))
    clock.now += 9
    assert fleet.candidates("m")[0].credits.sequences == 0
    clock.now += 2
    assert fleet.candidates("m")[0].credits.sequences == 8


def test_a_worker_is_lone_while_it_has_no_room_beside_a_job_that_is_to_be_alone(fleet: Fleet) -> None:
    worker = fleet.register(registration())
    fleet.report(worker, state())
    fleet.reserve("a", ("r1", 1), Credits(8, 5, 60), alone=True)
    assert fleet.candidates("m")[0].lone
    fleet.report(worker, state(0, 0, 0, running_sequences=1, settled=[PlacementKey(request_id="r1", attempt=1)]))
    assert fleet.candidates("m")[0].lone
    worker = fleet.register(registration())
    fleet.report(worker, state(0, 0, 0, running_sequences=1))
    assert fleet.candidates("m")[0].lone, "it is another stream of the same process"
    fleet.report(worker, state(7, 90, 900, running_sequences=1))
    assert not fleet.candidates("m")[0].lone
    fleet.report(worker, state(0, 0, 0, running_sequences=8))
    assert not fleet.candidates("m")[0].lone, "it is full of others"


def test_a_worker_that_has_left_is_known_for_a_while(fleet: Fleet, clock: Clock) -> None:
    old, other = fleet.register(registration("a")), fleet.register(registration("b"))
    for worker in (old, other):
        fleet.report(worker, state())
    assert fleet.left("m") == []
    fleet.leave(old)
    clock.now += 60
    fleet.leave(other)
    assert [candidate.id for candidate in fleet.left("m")] == ["a", "b"]
    assert fleet.left("other") == []
    fleet.report(fleet.register(registration("b", "2")), state())
    assert [candidate.id for candidate in fleet.left("m")] == ["a"]
    clock.now += 61
    assert fleet.left("m") == []


def test_the_room_is_that_of_all_workers_but_one(fleet: Fleet) -> None:
    for id in ("a", "b"):
        fleet.report(fleet.register(registration(id)), state())
    assert (fleet.room("m", 100), fleet.room("m", 100, but_on="b")) == (16, 8)


@given(
    st.lists(
        st.tuples(st.sampled_from(["reserve", "settle", "report"]), st.integers(0, 4), st.integers(1, 3)), max_size=40
    )
)
def test_credits_are_the_grant_less_what_is_outstanding(steps: list[tuple[str, int, int]]) -> None:
    fleet = Fleet(silence_s=3, placement_timeout_s=10, clock=Clock())
    worker = fleet.register(registration())
    fleet.report(worker, state())
    outstanding: dict[int, int] = {}
    for kind, number, sequences in steps:
        key = (f"r{number}", 1)
        if kind == "reserve":
            fleet.reserve("a", key, Credits(sequences, 0, 0))
            outstanding[number] = sequences
        elif kind == "settle":
            fleet.settle("a", key)
            outstanding.pop(number, None)
        else:
            fleet.report(worker, state(settled=[PlacementKey(request_id=key[0], attempt=1)]))
            outstanding.pop(number, None)
        assert fleet.candidates("m")[0].credits.sequences == 8 - sum(outstanding.values())


def test_silence_takes_a_worker_out_and_a_report_puts_it_back(fleet: Fleet, clock: Clock) -> None:
    worker = fleet.register(registration())
    fleet.report(worker, state())
    clock.now += 3.5
    assert not fleet.candidates("m")[0].healthy
    assert fleet.count_conditions("m")["silent"] == sum(fleet.count_conditions("m").values()) == 1
    assert fleet.serves("m"), "it is still connected"
    fleet.report(worker, state())
    assert fleet.candidates("m")[0].healthy


def test_a_draining_worker_gets_no_work(fleet: Fleet) -> None:
    worker = fleet.register(registration())
    fleet.report(worker, state(draining=True, running_sequences=1))
    assert not fleet.candidates("m")[0].healthy
    assert fleet.count_conditions("m")["draining"] == 1
    fleet.report(worker, state(draining=True))
    assert not fleet.candidates("m")[0].healthy
    assert fleet.count_conditions("m")["drained"] == 1


def test_a_new_incarnation_replaces_the_old_and_its_placements(fleet: Fleet) -> None:
    old = fleet.register(registration())
    fleet.report(old, state())
    fleet.reserve("a", ("r1", 1), Credits(8, 0, 0))
    new = fleet.register(registration(incarnation="2"))
    fleet.leave(old)
    assert fleet.candidates("m") == [], "the new one has not reported"
    fleet.report(new, state())
    assert fleet.candidates("m")[0].credits.sequences == 8
    assert fleet.candidates("m")[0].incarnation == "2"


def test_a_new_stream_of_the_same_incarnation_keeps_placements(fleet: Fleet) -> None:
    old = fleet.register(registration())
    fleet.report(old, state())
    fleet.reserve("a", ("r1", 1), Credits(8, 0, 0))
    new = fleet.register(registration())
    fleet.leave(old)
    fleet.report(new, state())
    assert fleet.candidates("m")[0].credits.sequences == 0


def test_what_an_old_stream_still_says_does_not_count(fleet: Fleet) -> None:
    old = fleet.register(registration())
    new = fleet.register(registration(incarnation="2"))
    fleet.report(new, state(5))
    fleet.report(old, state(1))
    assert fleet.candidates("m")[0].credits.sequences == 5


def test_the_catalog_names_models_of_connected_workers(fleet: Fleet) -> None:
    fleet.register(registration("a"))
    b = fleet.register(registration("b", max_context_tokens=1024))
    fleet.register(registration("c", name="another", tokenizer_hash="u"))
    entries = fleet.catalog().entries
    assert [len(entry.kv_formats) for entry in entries] == [1, 1]
    assert [(e.model.name, e.model.max_context_tokens, list(e.worker_addresses)) for e in entries] == [
        ("another", 2048, ["c:1"]),
        ("m", 1024, ["a:1", "b:1"]),
    ]
    fleet.leave(b)
    assert fleet.catalog().entries[1].model.max_context_tokens == 2048


def test_listeners_hear_of_changes(fleet: Fleet) -> None:
    heard: list[str] = []
    fleet.listen(on_report=lambda model: heard.append(model), on_catalog=lambda: heard.append("catalog"))
    worker = fleet.register(registration())
    fleet.report(worker, state())
    fleet.leave(worker)
    assert heard == ["catalog", "m", "catalog", "m"]


@pytest.mark.parametrize(
    "changes",
    [
        {"worker_id": ""},
        {"incarnation": ""},
        {"address": ""},
        {"name": ""},
        {"block_size": 0},
        {"max_context_tokens": 0},
    ],
)
def test_an_incomplete_registration_is_refused(fleet: Fleet, changes: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        fleet.register(registration(**changes))  # type: ignore[arg-type]


def test_workers_of_a_model_tokenize_and_hash_alike(fleet: Fleet) -> None:
    fleet.register(registration("a"))
    with pytest.raises(InvalidRequest, match="another tokenizer"):
        fleet.register(registration("b", tokenizer_hash="u"))
    with pytest.raises(InvalidRequest, match="block size"):
        fleet.register(registration("b", block_size=32))
    fleet.register(registration("a", incarnation="2", block_size=32))


def test_roles_are_known(fleet: Fleet) -> None:
    worker = fleet.register(registration(role=WORKER_ROLE_PREFILL))
    fleet.report(worker, state())
    assert fleet.candidates("m")[0].role == "prefill"
    fleet.report(worker, state(role=WORKER_ROLE_DECODE))
    assert fleet.candidates("m")[0].role == "decode"


async def test_a_worker_is_told_its_new_role(fleet: Fleet) -> None:
    worker = fleet.register(registration("a"))
    fleet.set_role("a", WORKER_ROLE_DECODE)
    assert (await anext(worker.outbox)).set_role == WORKER_ROLE_DECODE
    with pytest.raises(NotFound, match="No worker b is connected"):
        fleet.set_role("b", WORKER_ROLE_DECODE)


async def test_a_worker_is_told_to_leave_service_and_to_come_back(fleet: Fleet) -> None:
    worker = fleet.register(registration("a"))
    fleet.report(worker, state())
    assert fleet.drain("a", undo=False) == 0
    others = [fleet.register(registration(id)) for id in ("b", "c", "d")]
    fleet.report(fleet.register(registration("e", name="another")), state())
    for other in others[:2]:
        fleet.report(other, state())
    fleet.report(others[1], state(draining=True))
    assert fleet.drain("a", undo=True) == 1, "c drains and d has not reported"
    directives = [await anext(worker.outbox) for _ in range(2)]
    assert [directive.set_draining for directive in directives] == [True, False]
    assert all(directive.HasField("set_draining") for directive in directives)
    with pytest.raises(NotFound, match="No worker z is connected"):
        fleet.drain("z", undo=False)


def failed(age_ms: int = 0, incarnation: str = "1") -> AttemptReport:
    return AttemptReport(worker_id="a", worker_incarnation=incarnation, event=AttemptReport.EVENT_FAILED, age_ms=age_ms)


def test_a_failing_worker_is_out_until_a_probe_of_it_begins(fleet: Fleet, clock: Clock) -> None:
    worker = fleet.register(registration())
    fleet.report(worker, state())
    fleet.hear(failed(age_ms=700))
    assert fleet.suspects("a") and fleet.candidates("m")[0].healthy
    fleet.hear(failed())
    [candidate] = fleet.candidates("m")
    assert (candidate.healthy, candidate.room) == (False, 0)
    assert fleet.count_conditions("m")["breaker_open"] == 1
    clock.now += 1.01
    [candidate] = fleet.candidates("m")
    assert (candidate.healthy, candidate.probe, candidate.room) == (True, True, 1)
    fleet.reserve("a", ("r", 1), Credits(1, 1, 1))
    assert not fleet.candidates("m")[0].healthy
    fleet.settle("a", ("r", 1))
    assert fleet.candidates("m")[0].healthy
    fleet.reserve("a", ("s", 1), Credits(1, 1, 1))
    began = AttemptReport(worker_id="a", worker_incarnation="1", event=AttemptReport.EVENT_BEGAN, probe=True)
    fleet.hear(began)
    [candidate] = fleet.candidates("m")
    assert (candidate.healthy, candidate.probe, candidate.room) == (True, False, 7)


def test_a_breaker_outlives_its_workers_stream_and_not_its_process(fleet: Fleet, clock: Clock) -> None:
    fleet.report(fleet.register(registration()), state())
    fleet.hear(failed(age_ms=700))
    fleet.hear(failed())
    fleet.report(fleet.register(registration()), state())
    assert fleet.count_conditions("m")["breaker_open"] == 1
    fleet.report(fleet.register(registration(incarnation="2")), state())
    fleet.hear(failed(age_ms=700))
    fleet.hear(failed())
    assert fleet.count_conditions("m")["healthy"] == 1
