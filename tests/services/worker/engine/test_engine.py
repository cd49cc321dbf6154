"""Every sequence gets the tokens that it would get alone, whatever else runs, and in however little memory.

The fake runner reads and writes KV through the block tables, so a mistake in them gives other tokens.
"""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.batcher import Batcher
from services.worker.engine.batching_policy import BatchingPolicy, ContinuousBatching, StaticBatching
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.engine import Engine, StepResult
from services.worker.engine.sequence import Finish, SamplingParams, Sequence
from services.worker.engine.speculative import PromptLookup
from tests.fakes import FakeRunner, make_sequence

BLOCK_SIZE = 4
MAX_CONTEXT = 40


class Oracle(PromptLookup):
    """Knows what a sequence will be, and drafts that, but for some positions: its text never repeats itself."""

    def __init__(self, will_be: list[int], wrong: frozenset[int]) -> None:
        super().__init__(most=7)
        self._drafts = [(token + (position in wrong)) % 31 for position, token in enumerate(will_be)]

    def draft(self, tokens: Tokens[int], room: int) -> list[int]:
        return self._drafts[len(tokens) : len(tokens) + room]


@dataclass
class Setup:
    """An engine, and what its caller saw of it."""

    num_blocks: int = 64
    max_sequences: int = 8
    max_batch_tokens: int = 64
    policy: BatchingPolicy = field(default_factory=ContinuousBatching)
    speculative_rows: int = 0
    wrong: frozenset[int] = frozenset()  # positions at which a draft has another token than the sequence will have

    def __post_init__(self) -> None:
        self.runner = FakeRunner(self.num_blocks, BLOCK_SIZE)
        self.pool = BlockPool(self.num_blocks, BLOCK_SIZE)
        batcher = Batcher(
            self.pool,
            max_sequences=self.max_sequences,
            max_batch_tokens=self.max_batch_tokens,
            policy=self.policy,
            speculative_rows=self.speculative_rows,
        )
        self.engine = Engine(self.runner, self.pool, batcher, max_context=MAX_CONTEXT)
        self.expected: dict[Sequence, list[int]] = {}
        self.seen: dict[Sequence, list[int]] = {}
        self.started: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.index: set[bytes] = set()

    def add(self, sequence: Sequence) -> Sequence:
        self.expected[sequence] = self.runner.expected_tokens(sequence)
        self.seen[sequence] = list(sequence.tokens)
        if self.speculative_rows:
            sequence.lookup = Oracle(self.expected[sequence], self.wrong)
        self.engine.add(sequence)
        return sequence

    def step(self) -> StepResult:
        result = self.engine.step()
        for sequence, token in result.tokens:
            self.seen[sequence].append(token)
        self.started += result.started
        self.finished += result.finished
        self.index = self.index - set(result.block_events.removed) | set(result.block_events.stored)
        return result

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine makes no progress")

    def assert_exact(self) -> None:
        for sequence in self.finished:
            assert self.seen[sequence] == sequence.tokens == self.expected[sequence]
        assert len(self.started) == len(set(self.started))
        assert set(self.finished) <= set(self.started)
        assert self.index == set(self.pool.held_hashes())


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + position) % 31 for position in range(length)]


def test_refuses_a_pool_that_cannot_hold_one_full_sequence() -> None:
    with pytest.raises(ValueError, match=r"9 blocks of 4 tokens, too few for one sequence .* 40 tokens: it takes 10"):
        Setup(num_blocks=9)


def test_refuses_a_sequence_that_could_outgrow_the_context() -> None:
    setup = Setup()
    with pytest.raises(ValueError, match="exceed the context of 40"):
        setup.engine.add(make_sequence(1, prompt(33), max_tokens=8))
    setup.engine.add(make_sequence(1, prompt(32), max_tokens=8))


def test_one_sequence_from_first_to_last_token() -> None:
    setup = Setup()
    sequence = setup.add(make_sequence(1, prompt(6), max_tokens=3))
    results = [setup.step() for _ in range(3)]
    assert [len(result.tokens) for result in results] == [1, 1, 1]
    assert [result.started for result in results] == [[sequence], [], []]
    assert [result.finished for result in results] == [[], [], [sequence]]
    assert [result.computed_tokens for result in results] == [6, 1, 1]
    assert sequence.finish is Finish.LENGTH
    assert not setup.engine.has_work
    assert setup.pool.free_blocks == 64
    assert setup.engine.counters.steps == 3
    setup.assert_exact()


def test_stop_tokens_end_a_sequence() -> None:
    setup = Setup()
    [*_, third] = setup.runner.expected_tokens(make_sequence(1, prompt(6), max_tokens=3))
    sequence = setup.add(make_sequence(1, prompt(6), max_tokens=9, stop_token_ids=frozenset({third})))
    setup.run()
    assert sequence.finish is Finish.STOP
    assert sequence.tokens[-1] == third
    setup.assert_exact()


def test_together_as_alone() -> None:
    setup = Setup(max_sequences=16, max_batch_tokens=256)
    for key in range(16):
        setup.add(make_sequence(key, prompt(1 + key, first=key), max_tokens=1 + key))
    setup.run()
    assert max(len(batch) for batch in setup.runner.batches) == 16
    setup.assert_exact()


def test_in_chunks_as_alone() -> None:
    setup = Setup(max_sequences=2, max_batch_tokens=3)
    for key in range(4):
        setup.add(make_sequence(key, prompt(20, first=key)))
    setup.run()
    assert setup.engine.counters.prefill_chunks > 4
    assert all(sum(length for _, length in batch) <= 3 for batch in setup.runner.batches)
    setup.assert_exact()


def test_preempted_as_alone() -> None:
    setup = Setup(num_blocks=10)
    for key in range(6):
        setup.add(make_sequence(key, prompt(5, first=5 * key), max_tokens=30))
    setup.run()
    assert setup.engine.counters.preemptions > 0
    assert len(setup.finished) == 6
    setup.assert_exact()


def test_on_prefix_hits_as_alone() -> None:
    setup = Setup()
    for key in range(4):
        setup.add(make_sequence(key, [*prompt(16), key], max_tokens=12))
        setup.run()
    assert setup.engine.counters.prefix_hit_tokens == 3 * 16
    assert [sequence.cached_tokens for sequence in setup.finished] == [0, 16, 16, 16]
    setup.assert_exact()


def test_choices_share_their_prompt() -> None:
    setup = Setup()
    sampling = SamplingParams(temperature=1.0, seed=5)
    leader = setup.add(make_sequence(0, prompt(17), sampling=sampling))
    for choice in (1, 2):
        setup.add(make_sequence(choice, prompt(17), sampling=sampling, choice=choice, leader=leader))
    setup.step()
    assert (setup.engine.num_running, setup.engine.num_waiting) == (1, 2)
    setup.step()
    assert setup.engine.num_running == 3
    assert setup.pool.num_blocks - setup.pool.free_blocks == 4 + 3  # four of the prompt, one of each choice's own
    setup.run()
    assert len({tuple(sequence.tokens) for sequence in setup.finished}) == 3
    setup.assert_exact()


def test_a_resumed_sequence_goes_on_as_if_never_interrupted() -> None:
    sampling = SamplingParams(temperature=1.0, seed=9, frequency_penalty=0.5, repetition_penalty=1.2)
    setup = Setup()
    whole = setup.add(make_sequence(1, prompt(7), max_tokens=12, sampling=sampling))
    setup.run()
    resumed = Sequence(key=2, tokens=whole.tokens[:11], prompt_length=7, sampling=sampling, stop=whole.stop)
    setup.add(resumed)
    setup.run()
    assert resumed.tokens == whole.tokens
    assert setup.started == [whole, resumed]
    setup.assert_exact()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, seed=9, frequency_penalty=0.5, repetition_penalty=1.2, logprobs=2),
    ],
)
def test_with_drafts_as_alone(sampling: SamplingParams) -> None:
    """A wrong draft costs a step, and what was computed for it and after it is computed again."""
    setup = Setup(speculative_rows=8, wrong=frozenset({12, 13, 20}))
    setup.add(make_sequence(1, prompt(6), max_tokens=20, sampling=sampling))
    results = []
    while setup.engine.has_work:
        results.append(setup.step())
    # The first token comes with the prompt. Then drafts for positions 7 to 13, 13 to 19, 14 to 20 and 21 to 24.
    assert [len(result.tokens) for result in results] == [1, 6, 1, 7, 5]
    assert [len(result.logprobs) for result in results] == [
        0 if sampling.logprobs is None else n for n in [1, 6, 1, 7, 5]
    ]
    counters = setup.engine.counters
    assert (counters.draft_tokens, counters.accepted_tokens, counters.decode_tokens) == (
        7 + 7 + 7 + 4,
        5 + 0 + 6 + 4,
        19,
    )
    setup.assert_exact()
    assert setup.pool.free_blocks == 64


def test_a_stop_token_within_a_draft_ends_the_sequence() -> None:
    setup = Setup(speculative_rows=8)
    sampling = SamplingParams(temperature=1.0, seed=4)
    output = setup.runner.expected_tokens(make_sequence(1, prompt(6), max_tokens=12, sampling=sampling))[6:]
    place = next(place for place in range(2, 7) if output[place] not in output[:place])
    stop = frozenset({output[place]})
    sequence = setup.add(make_sequence(1, prompt(6), max_tokens=12, sampling=sampling, stop_token_ids=stop))
    sequence.lookup = Oracle(prompt(6) + output, frozenset())
    assert [len(setup.step().tokens) for _ in range(2)] == [1, place]
    assert (sequence.tokens[-1], sequence.finish) == (output[place], Finish.STOP)
    assert not setup.engine.has_work
    setup.assert_exact()


def test_cancel_frees_in_every_phase() -> None:
    setup = Setup(max_sequences=2, max_batch_tokens=8)
    setup.add(make_sequence("decoding", prompt(3)))
    setup.step()
    setup.add(make_sequence("prefilling", prompt(20, first=9)))
    setup.add(make_sequence("waiting", prompt(20)))
    setup.step()
    assert setup.engine.pending_prefill_tokens == 20 - 7 + 20
    for key in ("waiting", "prefilling", "decoding"):
        assert setup.engine.cancel(key)
    assert not setup.engine.cancel("decoding")
    assert setup.pool.free_blocks == 64
    assert not setup.engine.has_work


def test_a_failed_forward_moves_nobody() -> None:
    setup = Setup(max_batch_tokens=8)
    for key in range(3):
        setup.add(make_sequence(key, prompt(5 + key, first=key)))
    setup.step()
    for _ in range(4):
        setup.runner.fail_next = RuntimeError("out of memory")
        with pytest.raises(RuntimeError, match="out of memory"):
            setup.step()
        setup.step()
    assert setup.engine.cancel(0)
    setup.run()
    assert len(setup.finished) == 2
    assert setup.pool.free_blocks == 64
    setup.assert_exact()


def test_static_batches_as_alone() -> None:
    now_s = 0.0
    setup = Setup(policy=StaticBatching(2, 5.0, lambda: now_s))
    for key in range(3):
        setup.add(make_sequence(key, prompt(4, first=key), max_tokens=2 + key))
    together = []
    while setup.engine.has_work:
        computed = setup.step().computed_tokens
        together.append(setup.engine.num_running)
        now_s += 0.0 if computed else 5.0
    assert max(together) == 2
    assert together == [2, 1, 0, 0, 1, 1, 1, 0]  # the third waits for both, then for company, then runs alone
    setup.assert_exact()


def test_held_hashes_are_a_snapshot_that_later_events_continue() -> None:
    setup = Setup()
    setup.add(make_sequence(1, prompt(9), max_tokens=8))
    setup.step()
    index = set(setup.engine.exchange.snapshot().stored)
    assert len(index) == 2
    while setup.engine.has_work:
        events = setup.step().block_events
        index = index - set(events.removed) | set(events.stored)
    assert index == set(setup.engine.exchange.snapshot().stored)
    assert len(index) == 4


@dataclass(frozen=True)
class Arrival:
    """A request to come: at which step, what, and after how many more steps its caller gives up."""

    at_step: int
    prompt: list[int]
    max_tokens: int
    sampling: SamplingParams
    choices: int
    cancel_after: int | None
    cache_root: bytes


# A few prompts that share beginnings, so that hits happen.
prompts = st.builds(
    lambda stem, stem_length, tail: [*prompt(stem_length, first=stem), *tail],
    stem=st.sampled_from([0, 11]),
    stem_length=st.integers(1, 18),
    tail=st.lists(st.integers(0, 30), max_size=3),
)
samplings = st.sampled_from(
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5),
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=12, min_p=0.05, seed=2**63 + 1, frequency_penalty=0.4),
    ]
)
arrivals = st.builds(
    Arrival,
    at_step=st.integers(0, 30),
    prompt=prompts,
    max_tokens=st.integers(1, MAX_CONTEXT - 21),
    sampling=samplings,
    choices=st.sampled_from([1, 1, 1, 3]),
    cancel_after=st.none() | st.integers(0, 20),
    cache_root=st.sampled_from([b"one tenant", b"another"]),
)
setups = st.builds(
    lambda num_blocks, max_sequences, extra_tokens, static, speculative_rows, wrong: Setup(
        num_blocks=num_blocks,
        max_sequences=max_sequences,
        max_batch_tokens=max_sequences + extra_tokens,
        policy=StaticBatching(2, 0.0, lambda: 0.0) if static else ContinuousBatching(),
        speculative_rows=speculative_rows,
        wrong=wrong,
    ),
    num_blocks=st.sampled_from([10, 12, 20, 80]),
    max_sequences=st.integers(1, 6),
    extra_tokens=st.sampled_from([0, 1, 3, 30]),
    static=st.sampled_from([False, False, False, True]),
    speculative_rows=st.sampled_from([0, 4, 8]),
    wrong=st.frozensets(st.integers(0, MAX_CONTEXT)),
)


def arrive(setup: Setup, arrival: Arrival, number: int) -> list[Sequence]:
    sequences: list[Sequence] = []
    for choice in range(arrival.choices):
        leader = sequences[0] if sequences else None
        sequence = make_sequence(
            10 * number + choice,
            arrival.prompt,
            arrival.max_tokens,
            arrival.sampling,
            choice=choice,
            leader=leader,
            cache_root=arrival.cache_root,
        )
        sequences.append(setup.add(sequence))
    return sequences


@settings(max_examples=200, deadline=None)
@given(setup=setups, schedule=st.lists(arrivals, min_size=1, max_size=8), failing=st.sets(st.integers(0, 30)))
def test_any_schedule_as_alone(setup: Setup, schedule: list[Arrival], failing: set[int]) -> None:
    cancels: dict[int, list[Sequence]] = {}
    cancelled: set[Sequence] = set()
    for now in range(2000):
        for number, arrival in enumerate(schedule):
            if arrival.at_step == now:
                sequences = arrive(setup, arrival, number)
                if arrival.cancel_after is not None:
                    cancels.setdefault(now + arrival.cancel_after, []).append(sequences[0])
        cancelled.update(sequence for sequence in cancels.get(now, []) if setup.engine.cancel(sequence.key))
        if not setup.engine.has_work and now > 30:
            break
        setup.runner.fail_next = RuntimeError("as planned") if now in failing else None
        try:
            setup.step()
        except RuntimeError as error:
            assert str(error) == "as planned"
    setup.assert_exact()
    assert set(setup.finished) | cancelled == set(setup.expected)
    assert setup.pool.free_blocks == setup.num_blocks
    assert (setup.engine.num_running, setup.engine.num_waiting, setup.engine.pending_prefill_tokens) == (0, 0, 0)
