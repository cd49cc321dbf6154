"""Tokens that go to their caller past the request's task: all of them, once, in order, whatever holds them up."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from headrace.v1.sampling_pb2 import FinishReason, Stopping
from services.gateway.active_request import ActiveRequest
from services.gateway.direct import DirectDelivery, StepTally
from services.gateway.http.outlets import EventStream
from services.gateway.links.worker_links import SequenceFeed
from services.gateway.metrics import Metrics
from services.gateway.request import Delta
from services.gateway.text.choice import Choice
from tests.services.gateway.stack import Stack

UNFINISHED = FinishReason.FINISH_REASON_UNSPECIFIED


class Numbers:
    """A detokenizer whose texts are the ids."""

    def push(self, token_id: int) -> str:
        return f"{token_id} "

    def flush(self) -> str:
        return ""


class Outlet:
    def __init__(self) -> None:
        self.open = True
        self.deltas: list[Delta] = []

    def write(self, delta: Delta) -> None:
        assert self.open
        self.deltas.append(delta)


class Sequence:
    """A sequence whose first token has been delivered, with its feed and a task that the test plays."""

    def __init__(self, max_tokens: int = 1000) -> None:
        self.metrics = Metrics(CollectorRegistry()).for_model("m")
        self.outlet = Outlet()
        self.choice = Choice(0, Numbers(), Stopping(max_tokens=max_tokens))
        self.task = SimpleNamespace(waiting=True)
        self.feed = SequenceFeed(1, asyncio.Event())
        self.outlet.deltas.append(self.choice.advance([0], UNFINISHED))
        active = cast(ActiveRequest, self.task)
        self.feed.direct = DirectDelivery(active, self.choice, self.outlet, self.metrics)

    def step(self, token_ids: list[int], *, ending: bool = False) -> None:
        tally = StepTally(1.0)
        self.feed.receive(token_ids, tally, ending=ending)
        tally.close()

    def wake(self, finish_reason: Any = UNFINISHED) -> None:
        """The task looks at what has come, and delivers it."""
        self.feed.news.clear()
        if self.feed.token_ids or finish_reason:
            self.outlet.deltas.append(self.choice.advance(self.feed.take_tokens(), finish_reason))

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.outlet.deltas)


def test_a_token_in_the_middle_wakes_nobody() -> None:
    sequence = Sequence()
    sequence.step([1])
    sequence.step([2, 3])
    assert sequence.text == "0 1 2 3 "
    assert not sequence.feed.news.is_set()
    assert sequence.metrics.tokens.take() == 3
    assert sequence.metrics.inter_token_latency.take().count == 3


def test_the_last_token_is_for_the_task() -> None:
    sequence = Sequence()
    sequence.step([1], ending=True)
    assert sequence.text == "0 "
    assert sequence.feed.news.is_set()
    assert sequence.feed.token_ids == [1]


def test_what_fills_it_is_for_the_task_even_if_its_worker_does_not_end_it() -> None:
    sequence = Sequence(max_tokens=3)
    sequence.step([1])
    sequence.step([2])
    assert sequence.text == "0 1 "
    assert sequence.feed.news.is_set()
    assert sequence.feed.token_ids == [2]


def test_equal_gaps_of_a_step_are_counted_together() -> None:
    metrics, tally = Metrics(CollectorRegistry()).for_model("m"), StepTally(3.0)
    for gap_s, tokens in ((0.5, 1), (0.25, 2), (0.5, 1)):
        tally.add(metrics, gap_s, tokens)
    tally.close()
    assert metrics.tokens.take() == 4
    gaps = metrics.inter_token_latency.take()
    assert gaps.count == 4
    assert abs(gaps.mean_s - 0.375) < 0.01


@pytest.mark.parametrize(
    ("fields", "direct"),
    [
        ({}, True),
        ({"stream": True}, True),
        ({"stream": True, "n": 2}, True),
        ({"stream": True, "stop": "never said"}, False),
        ({"stream": True, "logprobs": 1}, False),
        ({"stream": True, "resumable": True}, False),
        ({"stream": True, "prompt": ["hello", "you"]}, False),
    ],
)
async def test_the_middle_of_plain_answers_goes_the_short_way(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], direct: bool
) -> None:
    delivered: list[int] = []
    deliver = DirectDelivery._deliver

    def counted(self: DirectDelivery, token_ids: list[int], tally: StepTally) -> None:
        delivered.extend(token_ids)
        deliver(self, token_ids, tally)

    monkeypatch.setattr(DirectDelivery, "_deliver", counted)
    answer = await stack.complete(**fields)
    assert answer.status_code == 200
    assert bool(delivered) == direct


async def test_a_fault_in_one_answer_is_not_its_neighbors(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = True

    def broken_once(self: EventStream, delta: Delta) -> None:
        nonlocal fails
        if fails:
            fails = False
            raise ValueError("a bug")
        write(self, delta)

    write = EventStream.write
    monkeypatch.setattr(EventStream, "write", broken_once)
    answers = await asyncio.gather(*(stack.complete(stream=True) for _ in range(3)))
    assert sorted("The server failed" in answer.text for answer in answers) == [False, False, True]
    assert len(stack.workers[0].starts) == 3  # none was started again


events = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["busy", "waits", "full", "reads", "wake"]), st.just(0)),
)


@given(st.lists(events, max_size=40))
def test_nothing_is_lost_doubled_or_overtaken(happenings: list[tuple[str, int]]) -> None:
    sequence, sent = Sequence(), 0
    for what, count in happenings:
        if what == "step":
            sequence.step([*range(sent + 1, sent + count + 1)])
            sent += count
        elif what in ("busy", "waits"):
            sequence.task.waiting = what == "waits"
        elif what in ("full", "reads"):
            sequence.outlet.open = what == "reads"
        elif sequence.feed.news.is_set():
            sequence.wake()
    sequence.step([sent + 1], ending=True)
    sequence.wake(FinishReason.FINISH_REASON_LENGTH)
    assert sequence.text == "".join(f"{number} " for number in range(sent + 2))
    assert [delta.seq for delta in sequence.outlet.deltas] == [*range(len(sequence.outlet.deltas))]
