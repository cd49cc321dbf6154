import pytest
import torch

from services.worker.engine.batcher import Batcher
from services.worker.engine.batching_policy import ContinuousBatching
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.engine import Engine
from services.worker.engine.kernels.paged_kv import PagedKV
from services.worker.engine.model.echo import EchoModel, echo_model
from services.worker.engine.model.interface import ModelError
from services.worker.engine.model_runner import ModelRunner
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams


def engine(model: EchoModel, blocks: int = 32) -> Engine:
    kv = PagedKV(model.facts.layer_shapes, blocks, 4, torch.float32, torch.device("cpu"))
    pool = BlockPool(blocks, 4)
    batcher = Batcher(pool, max_sequences=8, max_batch_tokens=16, policy=ContinuousBatching())
    return Engine(ModelRunner(model, kv, 64), pool, batcher, max_context=64)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=2.0, seed=3),
        SamplingParams(temperature=1.0, top_p=0.5, top_k=7, frequency_penalty=2.0, repetition_penalty=1.5),
    ],
)
def test_the_prompt_comes_back_whatever_the_sampling(sampling: SamplingParams) -> None:
    steps: list[float] = []
    running = engine(EchoModel(100, 64, step_s=0.5, sleep=steps.append))
    prompts = [[5, 6, 7], list(range(20)), [99]]
    sequences = [
        Sequence(key, list(prompt), len(prompt), sampling, StopParams(10)) for key, prompt in enumerate(prompts)
    ]
    for sequence in sequences:
        running.add(sequence)
    while running.has_work:
        running.step()
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.tokens[len(prompt) :] == [prompt[position % len(prompt)] for position in range(10)]
    assert steps == [0.5] * running.counters.steps


def test_a_resumed_sequence_goes_on_where_it_was() -> None:
    running = engine(EchoModel(100, 64))
    sequence = Sequence("r", [1, 2, 3, 1, 2], 3, SamplingParams(temperature=0.0), StopParams(6))
    running.add(sequence)
    while running.has_work:
        running.step()
    assert sequence.tokens[3:] == [1, 2, 3, 1, 2, 3]


def test_vocabulary_and_context_are_the_models() -> None:
    facts = echo_model({"vocab_size": 7, "max_position_embeddings": 9}, 0.0).facts
    assert (facts.vocabulary_size, facts.max_context_tokens) == (7, 9)
    assert echo_model({"text_config": {"vocab_size": 7, "max_position_embeddings": 9}}, 0.0).facts == facts
    with pytest.raises(ModelError, match="vocab_size"):
        echo_model({}, 0.0)
