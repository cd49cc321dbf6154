"""The token that each rule asks for, against plain numpy where the rule is arithmetic.

Whether a distribution is right is judged by chi-square over fixed seeds, so these tests give the same result every run.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.worker.engine.sampling import sample
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams

Floats = npt.NDArray[np.float64]
BIG = 3000  # a vocabulary wider than the windows that the sampler looks at first


def make(
    sampling: SamplingParams,
    prompt: Iterable[int] = (0,),
    output: Iterable[int] = (),
    choice: int = 0,
    stop: StopParams | None = None,
) -> Sequence:
    prompt, output = list(prompt), list(output)
    return Sequence(
        key=None,
        tokens=prompt + output,
        prompt_length=len(prompt),
        sampling=sampling,
        stop=stop or StopParams(max_tokens=10_000),
        choice=choice,
    )


def draw_each(logits: Tensor, draws: int, **params: float) -> list[int]:
    """Tokens drawn from one row of logits under seeds 0, 1, 2, ..."""
    sequences = [make(SamplingParams(seed=seed, **params)) for seed in range(draws)]  # type: ignore[arg-type]
    return sample(logits.expand(draws, -1), sequences)


def draw_many(logits: Tensor, draws: int, **params: float) -> Counter[int]:
    """How often `draw_each` draws which token."""
    return Counter(draw_each(logits, draws, **params))


def softmax(scores: Floats) -> Floats:
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum())


def reference_distribution(logits: Tensor, sampling: SamplingParams) -> Floats:
    """Temperature, top-k, top-p, min-p as their definitions say, with a full stable sort."""
    probabilities = softmax(logits.double().numpy() / sampling.temperature)
    order = np.argsort(-probabilities, kind="stable")
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    if sampling.top_p < 1.0:
        mass = np.cumsum(probabilities[order]) / probabilities[order].sum()
        order = order[: int(np.searchsorted(mass, sampling.top_p)) + 1]
    order = order[probabilities[order] >= sampling.min_p * probabilities.max()]
    kept = np.zeros_like(probabilities)
    kept[order] = probabilities[order]
    return np.asarray(kept / kept.sum())


def assert_distributed(counts: Counter[int], expected: Floats) -> None:
    """Chi-square over the tokens expected at least five times; no token that has no probability."""
    draws = counts.total()
    assert all(expected[token] > 0 for token in counts)
    common = [token for token in range(len(expected)) if expected[token] * draws >= 5]
    statistic = sum((counts[token] - expected[token] * draws) ** 2 / (expected[token] * draws) for token in common)
    degrees = len(common) - 1
    # Mean `degrees`, variance twice that: four standard deviations.
    assert statistic < degrees + 4 * np.sqrt(2 * max(degrees, 1))


def normal_logits(vocabulary: int, spread: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 9), []) == []


def test_greedy_takes_the_likeliest_and_of_equals_the_first() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 1.0]])
    assert sample(logits, [make(SamplingParams(temperature=0.0))] * 2) == [1, 0]


def test_greedy_and_random_rows_mix() -> None:
    logits = torch.full((4, 50), -100.0)
    logits[range(4), [4, 8, 15, 16]] = 100.0
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0),
        SamplingParams(top_p=0.5),
        SamplingParams(temperature=0.0, repetition_penalty=1.1),
    ]
    assert sample(logits, [make(kind) for kind in kinds]) == [4, 8, 15, 16]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_k": 500},  # more than there are
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.1, "temperature": 1.3},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params: dict[str, float]) -> None:
    logits = normal_logits(40)
    expected = reference_distribution(logits, SamplingParams(**params))  # type: ignore[arg-type]
    assert_distributed(draw_many(logits, 4000, **params), expected)


@pytest.mark.parametrize(
    "params", [{"top_k": 3}, {"top_k": 200}, {"top_k": 2000}, {"top_p": 0.6}, {"top_p": 0.9}, {"top_p": 0.999}], ids=str
)
def test_draws_follow_the_distribution_of_a_wide_vocabulary(params: dict[str, float]) -> None:
    """Wider than the windows that the sampler looks at first, with the cut in each of them."""
    logits = normal_logits(BIG, spread=3.0)
    expected = reference_distribution(logits, SamplingParams(**params))  # type: ignore[arg-type]
    assert_distributed(draw_many(logits, 1500, **params), expected)


def test_a_seed_gives_the_same_token_again() -> None:
    logits = normal_logits(1000)
    assert draw_many(logits, 50) == draw_many(logits, 50)


def test_seed_choice_and_position_each_give_other_draws() -> None:
    logits = torch.zeros(100_000)
    sequences = [
        make(SamplingParams(seed=1)),
        make(SamplingParams(seed=2)),
        make(SamplingParams(seed=1), choice=1),
        make(SamplingParams(seed=1), output=[5]),
    ]
    assert len(set(sample(logits.expand(4, -1), sequences))) == 4


def test_the_draw_is_the_same_wherever_prompt_ends_and_output_begins() -> None:
    logits = normal_logits(1000).expand(2, -1)
    params = SamplingParams(seed=1)
    first, second = sample(logits, [make(params, prompt=[1, 2], output=[3]), make(params, prompt=[1, 2, 3])])
    assert first == second


params_of_all_kinds = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.1, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 40, 64, 65, 1500, BIG, 10 * BIG]),
    min_p=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 2**64 - 1),
    frequency_penalty=st.sampled_from([0.0, 0.6]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    logit_bias=st.sampled_from([(), ((3, 4.0),), ((7, -100.0), (8, 100.0))]),
)


@settings(max_examples=40, deadline=None)
@given(params=st.lists(params_of_all_kinds, min_size=2, max_size=6), spread=st.sampled_from([0.1, 1.0, 4.0]))
def test_a_row_does_not_depend_on_the_others(params: list[SamplingParams], spread: float) -> None:
    logits = torch.stack([normal_logits(BIG, spread, seed) for seed in range(len(params))])
    before = logits.clone()
    sequences = [make(each, prompt=[5, 6], output=[7, 7]) for each in params]
    together = sample(logits, sequences)
    assert torch.equal(logits, before)
    assert together == [sample(logits[row : row + 1], [sequences[row]])[0] for row in range(len(params))]


def test_penalties_are_those_of_the_definitions() -> None:
    vocabulary = 30
    logits = normal_logits(vocabulary)
    prompt, output = [1, 2, 2, 3], [3, 4, 4, 4]
    for repetition, frequency, presence in [(1.5, 0, 0), (0.7, 0, 0), (1, 0.8, 0), (1, 0, 1.1), (1.4, -0.5, 0.3)]:
        scores = logits.double().numpy().copy()
        for token in set(prompt + output):
            scores[token] = scores[token] / repetition if scores[token] > 0 else scores[token] * repetition
        for token, times in Counter(output).items():
            scores[token] -= frequency * times + presence
        params = SamplingParams(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
        sequences = [make(replace(params, seed=seed), prompt, output) for seed in range(4000)]
        counts = Counter(sample(logits.expand(len(sequences), -1), sequences))
        assert_distributed(counts, softmax(scores))
        greedy = make(replace(params, temperature=0.0), prompt, output)
        assert sample(logits.unsqueeze(0), [greedy]) == [int(scores.argmax())]


@pytest.mark.parametrize("kind", [{"temperature": 0.0}, {"top_k": 1}], ids=str)
def test_bias_is_added_before_penalties_and_filters(kind: dict[str, float]) -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    assert sample(logits, [make(SamplingParams(logit_bias=((1, -2.0),), **kind))]) == [2]  # type: ignore[arg-type]
    assert sample(logits, [make(SamplingParams(logit_bias=((0, 9.0), (1, -100.0)), **kind))]) == [0]  # type: ignore[arg-type]
    both = SamplingParams(logit_bias=((3, 3.0),), repetition_penalty=2.0, **kind)  # type: ignore[arg-type]
    assert sample(logits, [make(both, prompt=[3])]) == [1]  # (1 + 3) / 2 and not 1 / 2 + 3


def test_draws_follow_the_biased_distribution() -> None:
    logits, bias = normal_logits(40), ((2, 1.5), (5, -1.0), (30, 2.0))
    biased = logits.double().numpy().copy()
    for token, added in bias:
        biased[token] += added
    sequences = [make(SamplingParams(seed=seed, logit_bias=bias)) for seed in range(4000)]
    assert_distributed(Counter(sample(logits.expand(4000, -1), sequences)), softmax(biased))


def test_min_tokens_keeps_stop_tokens_away_until_then() -> None:
    logits = torch.tensor([[0.0, 9.0, 5.0]])
    stop = StopParams(max_tokens=9, min_tokens=2, stop_token_ids=frozenset({1, 77}))  # 77: beyond the vocabulary
    greedy = SamplingParams(temperature=0.0)
    assert sample(logits, [make(greedy, output=[2], stop=stop)]) == [2]
    assert sample(logits, [make(greedy, output=[2, 2], stop=stop)]) == [1]
    assert sample(logits, [make(SamplingParams(top_k=1), output=[2], stop=stop)]) == [2]


def test_top_k_of_one_is_greedy_also_among_equals() -> None:
    logits = torch.zeros(BIG)
    logits[[700, 2900]] = 1.0
    assert set(draw_many(logits, 50, top_k=1)) == {700}


def test_equals_at_the_cut_stay_in_order_of_id() -> None:
    logits = torch.zeros(BIG)
    logits[[2500, 17]] = 9.0
    assert set(draw_many(logits, 400, top_k=4)) <= {0, 1, 17, 2500}
    assert set(draw_many(logits, 200, top_k=1000, top_p=0.2)) == {17}
    thirds = torch.arange(BIG).remainder(3).float()
    assert max(draw_many(thirds, 400, top_k=50)) == 149


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    assert set(draw_many(torch.zeros(4), 300, top_p=top_p)) == set(range(kept))


def test_top_p_counts_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(draw_many(logits, 300, top_k=2, top_p=0.56)) == {0}  # 0.4 of 0.7 is 0.57
    assert set(draw_many(logits, 300, top_k=2, top_p=0.58)) == {0, 1}


def test_top_p_counts_what_a_wide_top_k_left() -> None:
    logits = torch.arange(BIG) * -1e-4
    expected = reference_distribution(logits, SamplingParams(top_k=2000, top_p=0.3))
    assert_distributed(draw_many(logits, 1500, top_k=2000, top_p=0.3), expected)


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.8}], ids=str)
def test_a_small_difference_does_not_swap_tokens(params: dict[str, float]) -> None:
    logits = torch.tensor([1.0, 1.000001, 0.5, 0.2])
    swapped = torch.tensor([1.000001, 1.0, 0.5, 0.2])
    assert draw_each(logits, 300, **params) == draw_each(swapped, 300, **params)


def test_top_p_of_zero_keeps_one() -> None:
    assert set(draw_many(normal_logits(40), 50, top_p=0.0)) == {int(normal_logits(40).argmax())}


def test_min_p_of_one_keeps_the_likeliest() -> None:
    assert set(draw_many(normal_logits(40), 50, min_p=1.0)) == {int(normal_logits(40).argmax())}


@pytest.mark.parametrize("temperature", [1e-5, 1e-40])
def test_tiny_temperatures_are_as_good_as_greedy(temperature: float) -> None:
    logits = normal_logits(40, spread=50.0)
    assert set(draw_many(logits, 50, temperature=temperature)) == {int(logits.argmax())}


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 1025])
def test_any_width_of_vocabulary(vocabulary: int) -> None:
    logits = normal_logits(vocabulary)
    for params in ({}, {"top_p": 0.9}, {"top_k": 64}):
        assert all(0 <= token < vocabulary for token in draw_many(logits, 200, **params))


def test_tokens_without_probability_are_never_drawn() -> None:
    logits = torch.full((1000,), -torch.inf)
    logits[[130, 999]] = 0.0
    assert set(draw_many(logits, 300)) == {130, 999}
    assert set(draw_many(logits, 300, top_p=0.99)) == {130, 999}


def test_a_row_that_cannot_be_drawn_from_spares_the_others() -> None:
    logits = torch.stack([torch.full((50,), torch.nan), torch.full((50,), -torch.inf), normal_logits(50)])
    for params in (SamplingParams(), SamplingParams(top_p=0.9)):
        tokens = sample(logits, [make(params)] * 3)
        assert all(0 <= token < 50 for token in tokens)
        assert tokens[2:] == sample(logits[2:], [make(params)])
