from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.index import HolderKey
from services.scheduler.kv_plans import Candidate, Credits, JobShape
from services.scheduler.placement import Choice, Policy, impossible, kept, place

BLOCK = 16


class Hits:
    """An index in which each worker holds so many leading blocks."""

    def __init__(self, blocks: Mapping[str, int]) -> None:
        self._blocks = blocks

    def match(self, kv_format: str, hashes: Sequence[bytes]) -> "Found":
        return Found({(worker, "1"): min(count, len(hashes)) for worker, count in self._blocks.items()})


class Found:
    """What each holder has of a prompt."""

    def __init__(self, blocks: dict[HolderKey, int]) -> None:
        self._blocks = blocks

    def blocks(self, key: HolderKey) -> int:
        return self._blocks.get(key, 0)

    def best(self, count: int) -> list[tuple[HolderKey, int]]:
        return sorted(self._blocks.items(), key=lambda held: (-held[1], held[0]))[:count]


NO_HITS = Hits({})
FULL = Credits(sequences=8, blocks=1000, prefill_tokens=4096)


def worker(id: str = "a", **changes: object) -> Candidate:
    base = Candidate(
        id=id,
        incarnation="1",
        kv_format="f",
        block_size=BLOCK,
        block_bytes=400_000,  # a millisecond
        max_sequences=8,
        total_blocks=1000,
        healthy=True,
        free_blocks=0,
        role="both",
        credits=FULL,
        sequences=0,
        pending_prefill_tokens=0,
        prefill_tokens_per_s=1000.0,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def job(prompt_tokens: int = 100, choices: int = 1, request_id: str = "r") -> JobShape:
    hashes = [bytes([position % 256]) * 16 for position in range(prompt_tokens // BLOCK)]
    return JobShape(request_id, prompt_tokens, choices, hashes)


def chosen(
    shape: JobShape, *workers: Candidate, hits: Hits = NO_HITS, avoid: str = "", beyond_share: bool = False
) -> str | None:
    choice = place(shape, workers, hits, avoid=avoid, beyond_share=beyond_share)
    return choice.worker.id if choice else None


def test_a_probe_takes_one_job_and_preferably_one_that_has_not_failed() -> None:
    probe, busy = worker("p", probe=True), worker("b", sequences=3)
    assert chosen(job(), probe, busy) == "p"
    assert chosen(replace(job(), failed=True), probe, busy) == "b"
    assert chosen(replace(job(), failed=True), probe) == "p", "it may not wait for ever"
    assert chosen(replace(job(), failed=True), probe, busy, avoid="b") == "p"
    assert chosen(job(), replace(probe, healthy=False)) is None
    assert (probe.room, replace(probe, healthy=False).room, busy.room) == (1, 0, 8)


def test_a_probe_computes_no_prompt_for_others() -> None:
    decode, prefill = worker("d", role="decode"), worker("p", role="prefill", probe=True)
    choice = place(job(2000), [decode, prefill], NO_HITS)
    assert choice is not None and choice.plan.prefill is None


def test_nobody_to_choose_from() -> None:
    assert chosen(job()) is None
    assert chosen(job(), worker(healthy=False)) is None
    assert chosen(job(), worker(credits=Credits(0, 1000, 4096))) is None


def test_the_least_loaded_of_equals() -> None:
    assert chosen(job(), worker("a", sequences=3), worker("b", sequences=1), worker("c", sequences=2)) == "b"
    assert chosen(job(), worker("a", pending_prefill_tokens=500), worker("b", pending_prefill_tokens=100)) == "b"


def test_a_prefix_hit_draws_until_the_queue_takes_longer_than_moving_the_prefix() -> None:
    hits = Hits({"a": 40})  # 640 tokens, which travel in 40 ms
    assert chosen(job(1000), worker("a", pending_prefill_tokens=49), worker("b"), hits=hits) == "a"
    assert chosen(job(1000), worker("a", pending_prefill_tokens=51), worker("b"), hits=hits) == "b"
    slow = {"block_bytes": 400_000_000}
    assert chosen(job(1000), worker("a", pending_prefill_tokens=600, **slow), worker("b", **slow), hits=hits) == "a"
    assert chosen(job(1000), worker("a", pending_prefill_tokens=700, **slow), worker("b", **slow), hits=hits) == "b"
    assert chosen(job(1000), worker("a", sequences=7, **slow), worker("b", **slow), hits=hits) == "a"


def plan(shape: JobShape, *workers: Candidate, hits: Hits = NO_HITS) -> Choice:
    choice = place(shape, workers, hits)
    assert choice is not None
    return choice


def test_a_prefix_is_fetched_from_who_has_most_of_it_and_one_more_is_named() -> None:
    hits = Hits({"b": 20, "cache": 40, "c": 30, "a": 5})
    choice = plan(job(1000), worker("a"), hits=hits)
    assert (choice.reason, choice.plan.hit_tokens, choice.cost.prefill_tokens) == ("fetch", 640, 360)
    assert choice.plan.holders == ((("cache", "1"), 40), (("c", "1"), 30))


def test_what_is_here_is_not_fetched_nor_what_is_computed_sooner_than_moved() -> None:
    assert plan(job(1000), worker("a"), hits=Hits({"a": 40, "b": 40})).reason == "prefix_hit"
    slow = worker("a", block_bytes=400_000 * 20)
    assert plan(job(1000), slow, hits=Hits({"b": 40})).reason == "least_loaded"
    assert plan(job(1000), worker("a"), hits=Hits({"a": 39, "b": 40})).reason == "fetch"
    assert plan(job(1000), worker("a", prefill_tokens_per_s=1e6), hits=Hits({"a": 39, "b": 40})).reason == "prefix_hit"


def test_long_cold_prompts_of_a_decode_worker_are_computed_by_a_prefill_worker() -> None:
    decode, prefill = worker("d", role="decode"), worker("p", role="prefill")
    choice = plan(job(1000), decode, prefill)
    assert (choice.worker.id, choice.reason) == ("d", "prefill")
    assert choice.plan.prefill is not None
    assert (choice.plan.prefill.worker.id, choice.plan.prefill.blocks) == ("p", 62)
    assert choice.plan.prefill.cost == Credits(sequences=1, blocks=63, prefill_tokens=1000)
    assert choice.cost == Credits(sequences=1, blocks=64, prefill_tokens=8)


def test_short_prompts_and_cached_ones_are_computed_where_they_are_decoded() -> None:
    decode, prefill = worker("d", role="decode"), worker("p", role="prefill")
    assert plan(job(20), decode, prefill).reason == "least_loaded"
    assert plan(job(1000), decode, prefill, hits=Hits({"d": 62})).reason == "prefix_hit"
    assert plan(job(1000), decode, prefill, hits=Hits({"c": 62})).reason == "fetch"


def test_a_prefill_worker_that_is_full_or_swamped_is_left_alone() -> None:
    decode = worker("d", role="decode")
    full = worker("p", role="prefill", credits=Credits(8, 1000, 100), pending_prefill_tokens=5000)
    assert plan(job(1000), decode, full).reason == "least_loaded"
    swamped = worker("p", role="prefill", pending_prefill_tokens=3500)
    assert plan(job(1000), decode, swamped).reason == "least_loaded"
    away = worker("p", role="prefill", healthy=False)
    assert plan(job(1000), decode, away).reason == "least_loaded"
    other_format = worker("p", role="prefill", kv_format="g")
    assert plan(job(1000), decode, other_format).reason == "least_loaded"


def test_the_sooner_of_two_prefill_workers_computes() -> None:
    decode, busy, idle = (
        worker("d", role="decode"),
        worker("p", role="prefill", sequences=4),
        worker("q", role="prefill"),
    )
    prefill = plan(job(1000), decode, busy, idle).plan.prefill
    assert prefill is not None and prefill.worker.id == "q"
    prefill = plan(job(1000), decode, busy, idle, hits=Hits({"p": 30})).plan.prefill
    assert prefill is not None and prefill.worker.id == "p", "it has half of the prompt"


def test_least_loaded_knows_no_kv_and_round_robin_goes_round() -> None:
    workers = [worker("a", sequences=2), worker("b"), worker("c", sequences=1)]
    hits = Hits({"a": 60})
    choice = place(job(1000), workers, hits, policy="least_loaded")
    assert choice is not None and (choice.worker.id, choice.reason) == ("b", "least_loaded")
    turns = [place(job(1000), workers, hits, policy="round_robin", turn=turn) for turn in range(6)]
    assert "".join(choice.worker.id for choice in turns if choice) == "abcabc"
    workers[1] = worker("b", credits=Credits())
    choice = place(job(1000), workers, hits, policy="round_robin", turn=1)
    assert choice is not None and choice.worker.id == "c"


def test_the_last_prompt_token_is_never_a_hit() -> None:
    choice = place(job(64), [worker()], Hits({"a": 4}))
    assert choice is not None
    assert (choice.plan.hit_tokens, choice.cost.prefill_tokens) == (48, 16)
    choice = place(job(65), [worker()], Hits({"a": 4}))
    assert choice is not None
    assert (choice.plan.hit_tokens, choice.reason) == (64, "prefix_hit")


def test_blocks_of_an_earlier_incarnation_are_no_hit() -> None:
    choice = place(job(), [worker(incarnation="2")], Hits({"a": 6}))
    assert choice is not None
    assert (choice.plan.hit_tokens, choice.reason) == (0, "least_loaded")


def test_choices_share_the_prompts_blocks() -> None:
    choice = place(job(100, choices=3), [worker()], NO_HITS)
    assert choice is not None
    assert choice.cost == Credits(sequences=3, blocks=7 + 3, prefill_tokens=100)


def test_ties_are_spread_evenly() -> None:
    workers = [worker(id) for id in "abcd"]
    counts = dict.fromkeys("abcd", 0)
    for number in range(400):
        counts[chosen(job(request_id=f"r{number}"), *workers) or ""] += 1
    assert min(counts.values()) > 60


def test_the_worker_that_failed_is_taken_only_if_no_other_can() -> None:
    busy = worker("b", sequences=7)
    assert chosen(job(), worker("a"), busy, avoid="a") == "b"
    assert chosen(job(), worker("a"), worker("b", credits=Credits()), avoid="a") == "a"


def test_a_prefill_worker_decodes_only_if_no_other_can() -> None:
    assert chosen(job(), worker("a", role="prefill"), worker("b", sequences=7)) == "b"
    assert chosen(job(), worker("a", role="prefill")) == "a"


def test_a_prompt_beyond_every_grant_goes_where_no_prefill_waits() -> None:
    assert chosen(job(10_000), worker(sequences=5)) == "a"
    assert chosen(job(10_000), worker(sequences=5, pending_prefill_tokens=1)) is None


def test_a_job_beyond_a_share_goes_to_an_idle_worker() -> None:
    share = Credits(sequences=2, blocks=50, prefill_tokens=512)
    assert chosen(job(1000, choices=6), worker(credits=share)) == "a"
    assert chosen(job(1000, choices=6), worker(credits=share, sequences=1)) is None


def test_a_job_that_has_waited_long_goes_where_all_that_is_free_would_do() -> None:
    share = Credits(sequences=2, blocks=50, prefill_tokens=512)
    half_full = worker(credits=share, free_blocks=100, sequences=4, pending_prefill_tokens=10)
    assert chosen(job(1000, choices=4), half_full) is None
    assert chosen(job(1000, choices=4), half_full, beyond_share=True) == "a"
    assert chosen(job(1000, choices=5), half_full, beyond_share=True) is None
    assert chosen(job(2000, choices=4), half_full, beyond_share=True) is None
    no_prefill = replace(half_full, credits=Credits(sequences=2, blocks=50))
    assert chosen(job(1000, choices=4), no_prefill, beyond_share=True) is None
    assert chosen(job(1000, choices=4), replace(half_full, healthy=False), beyond_share=True) is None


def test_a_prompt_may_fill_the_whole_pool_but_for_its_answer() -> None:
    pool = worker(total_blocks=4)
    assert impossible(job(4 * BLOCK - 1), [pool]) is None
    assert chosen(job(4 * BLOCK - 1), pool) == "a"
    assert impossible(job(4 * BLOCK + 1), [pool]) is not None


def test_deterministic_jobs_go_to_deterministic_workers_and_stay_among_their_like() -> None:
    plain, one, other = (
        worker("a"),
        worker("b", deterministic=True, kv_format="x", sequences=3),
        worker("c", deterministic=True, kv_format="y"),
    )
    wanted = replace(job(), deterministic=True)
    for policy in get_args(Policy):
        chosen_ = [place(wanted, [plain, one, other], NO_HITS, policy=policy, turn=turn) for turn in range(3)]
        assert {choice.worker.id for choice in chosen_ if choice} <= {"b", "c"}
    assert chosen(job(), plain, one, other) in "abc"
    assert chosen(replace(wanted, kv_format="x"), plain, one, other, avoid="b") == "b"
    assert chosen(wanted, plain) is None
    assert "--deterministic" in str(impossible(wanted, [plain]))
    assert "computes exactly as" in str(impossible(replace(wanted, kv_format="z"), [plain, one, other]))
    assert impossible(wanted, [plain, one]) is None
    assert "8 sequences" in str(impossible(replace(wanted, choices=9), [worker(max_sequences=16), one]))


def test_a_job_that_is_to_be_alone_waits_for_an_idle_worker_and_takes_all_of_it() -> None:
    alone = replace(job(800), alone=True)
    busy, idle = worker("a", sequences=1), worker("b", pending_prefill_tokens=0)
    assert chosen(alone, busy) is None
    assert chosen(alone, busy, beyond_share=True) is None
    choice = place(alone, [busy, idle, worker("p", role="prefill", sequences=1)], NO_HITS)
    assert choice is not None and choice.costs() == {"b": Credits(8, 800 // BLOCK + 1, 800)}


def test_one_worker_is_kept_for_jobs_that_are_to_be_alone() -> None:
    alone = replace(job(800), alone=True)
    busy = [worker("b", sequences=1), worker("a", sequences=7), worker("p", role="prefill", sequences=1)]
    assert kept(alone, busy) == "a", "whoever asks, however busy each is"
    assert kept(alone, [*busy, worker("c")]) == "c", "it is idle"
    assert kept(alone, [*busy, worker("d", sequences=8, lone=True)]) == "d", "it is nobody else's already"
    assert kept(alone, [worker("a", healthy=False), worker("b", total_blocks=10), busy[-1]]) == "p"
    assert kept(alone, []) == ""


def test_jobs_that_are_to_be_alone_leave_others_a_worker() -> None:
    alone = replace(job(800), alone=True)
    lone = worker("a", sequences=8, credits=Credits(), lone=True)
    assert chosen(alone, lone, worker("b")) is None
    assert chosen(alone, lone, worker("b"), worker("c", sequences=8, credits=Credits())) is None
    assert chosen(alone, lone, worker("b"), worker("c", sequences=1)) == "b"
    assert chosen(alone, worker("a"), worker("b", sequences=8, credits=Credits())) == "a", "it is kept for such jobs"


def test_what_no_worker_could_ever_run_is_named() -> None:
    assert impossible(job(), []) is None
    assert impossible(job(), [worker()]) is None
    assert impossible(job(choices=9), [worker(), worker("b", max_sequences=16)]) is None
    assert "9 choices" in str(impossible(job(choices=9), [worker()]))
    assert "fit no connected worker" in str(impossible(job(20_000), [worker()]))
    assert chosen(job(choices=9), worker()) is None


workers_strategy = st.lists(
    st.builds(
        worker,
        id=st.sampled_from("abcdefgh"),
        healthy=st.booleans(),
        role=st.sampled_from(["both", "prefill", "decode"]),
        max_sequences=st.integers(1, 16),
        total_blocks=st.integers(1, 200),
        credits=st.builds(Credits, st.integers(-2, 16), st.integers(-10, 200), st.integers(-100, 4096)),
        sequences=st.integers(0, 16),
        pending_prefill_tokens=st.integers(0, 5000),
    ),
    unique_by=lambda candidate: candidate.id,
    max_size=8,
)


@given(
    workers_strategy,
    st.builds(job, prompt_tokens=st.integers(1, 4000), choices=st.integers(1, 8)),
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 300)),
)
def test_credits_are_never_overdrawn_but_on_what_is_idle(
    workers: list[Candidate], shape: JobShape, hits: dict[str, int]
) -> None:
    choice = place(shape, workers, Hits(hits))
    if choice is None:
        assert not any(
            w.healthy
            and w.credits.sequences >= shape.choices
            and w.credits.blocks >= shape.prompt_tokens // BLOCK + 1 + shape.choices
            and w.credits.prefill_tokens >= shape.prompt_tokens
            for w in workers
        )
        return
    taker, cost = choice.worker, choice.cost
    assert taker.healthy
    assert taker.credits.sequences > 0
    assert 0 < cost.prefill_tokens == choice.plan.compute_tokens
    if choice.plan.prefill is None:
        assert choice.plan.compute_tokens == shape.prompt_tokens - choice.plan.hit_tokens
    else:
        assert choice.plan.compute_tokens <= BLOCK
    left = taker.credits - cost
    idle = not taker.sequences and not taker.pending_prefill_tokens
    fits_idle = cost.sequences <= taker.max_sequences and cost.blocks - cost.sequences <= taker.total_blocks
    assert (left.sequences >= 0 and left.blocks >= 0) or (idle and fits_idle)
    assert left.prefill_tokens >= 0 or not taker.pending_prefill_tokens


@given(workers_strategy, st.permutations(range(8)))
def test_the_order_of_workers_does_not_matter(workers: list[Candidate], order: list[int]) -> None:
    shuffled = [workers[position] for position in order if position < len(workers)]
    assert place(job(), workers, NO_HITS) == place(job(), shuffled, NO_HITS)
