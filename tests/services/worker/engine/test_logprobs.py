"""Log-probabilities are those of the model alone, against transformers' own and against numpy."""

from pathlib import Path

import pytest
import torch

from services.worker.engine.batcher import Batcher
from services.worker.engine.batching_policy import ContinuousBatching
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.engine import Engine
from services.worker.engine.logprobs import TokenLogprobs, token_logprobs
from services.worker.engine.model.loading import Implementation, load_model
from services.worker.engine.model_runner import build_model_runner
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams
from tests.services.worker.engine.model.test_llama import SIZES
from tests.services.worker.engine.tiny_models import prompts, save_tiny


def ask(count: int | None, tokens: list[int] | None = None, key: int = 0) -> Sequence:
    """A sequence whose draws are bent in every way."""
    sampling = SamplingParams(
        temperature=1.7, top_k=30, seed=key, repetition_penalty=1.3, logit_bias=((5, 4.0), (6, -100.0)), logprobs=count
    )
    tokens = tokens or [1]
    return Sequence(key, list(tokens), len(tokens), sampling, StopParams(max_tokens=12))


@pytest.mark.parametrize("implementation", ["native", "compiled"])
def test_they_are_transformers_log_softmax(tmp_path: Path, implementation: Implementation) -> None:
    reference = save_tiny(tmp_path, "LlamaConfig", **{**SIZES, "intermediate_size": 64, "head_dim": 16})
    runner = build_model_runner(load_model(tmp_path, dtype="float32", implementation=implementation), kv_blocks=64)
    pool = BlockPool(runner.num_blocks, runner.block_size)
    batcher = Batcher(pool, max_sequences=8, max_batch_tokens=24, policy=ContinuousBatching())
    engine = Engine(runner, pool, batcher, max_context=128)
    sequences = [ask(5, prompt, key) for key, prompt in enumerate(prompts())]
    reported: dict[Sequence, list[TokenLogprobs]] = {sequence: [] for sequence in sequences}
    for sequence in [*sequences, ask(None, [7, 8, 9], key=99)]:
        engine.add(sequence)
    while engine.has_work:
        for sequence, logprobs in engine.step().logprobs:
            reported[sequence].append(logprobs)
    for sequence, found in reported.items():
        with torch.inference_mode():
            logits = reference(torch.tensor([sequence.tokens])).logits[0, sequence.prompt_length - 1 : -1]
        expected = logits.log_softmax(dim=-1)
        assert len(found) == sequence.output_length == 12
        for row, logprobs, token in zip(expected, found, sequence.tokens[sequence.prompt_length :], strict=True):
            assert logprobs.token == pytest.approx(float(row[token]), abs=1e-4)
            torch.testing.assert_close(torch.tensor(logprobs.top), row.topk(5).values, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.tensor(logprobs.top), row[logprobs.top_ids], rtol=1e-4, atol=1e-4)


def test_only_those_that_ask_have_any() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    asks, does_not, asks_for_its_own = ask(2), ask(None), ask(0)
    found = dict(token_logprobs(logits, [asks, does_not, asks_for_its_own], [3, 3, 3]))
    assert found.keys() == {asks, asks_for_its_own}
    assert len(found[asks].top) == 2 and not found[asks_for_its_own].top


def test_of_equals_the_lower_id_counts_as_the_likelier() -> None:
    logits = torch.zeros(1, 40)
    logits[0, [30, 12]] = 1.0
    [(_, found)] = token_logprobs(logits, [ask(4)], [39])
    assert found.top_ids == [12, 30, 0, 1]


@pytest.mark.parametrize("vocabulary", [1, 19, 128, 129, 2560, 5003])
@pytest.mark.parametrize("grain", [0.001, 1.0])  # coarse: many equals
def test_the_likeliest_are_those_of_a_full_sort(vocabulary: int, grain: float) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 3
    logits = (logits / grain).round() * grain
    [(_, found)] = token_logprobs(logits.unsqueeze(0), [ask(20)], [0])
    top, ids = logits.log_softmax(dim=-1).sort(descending=True, stable=True)
    assert (found.top_ids, found.top) == (ids[:20].tolist(), top[:20].tolist())


def test_a_row_that_cannot_be_drawn_from_has_no_likelihoods() -> None:
    [(_, found)] = token_logprobs(torch.full((1, 10), torch.nan), [ask(20)], [0])
    assert found == TokenLogprobs(-torch.inf, list(range(10)), [-torch.inf] * 10)
