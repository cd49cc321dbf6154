from pathlib import Path

import pytest
import torch

from services.worker.engine.batcher import Batcher
from services.worker.engine.batching_policy import ContinuousBatching
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.engine import Engine
from services.worker.engine.kernels.paged_kv import PagedKV
from services.worker.engine.model.echo import EchoModel, echo_model, repeated
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


BEGIN, END, HEAD, NEWLINE = 90, 91, 92, 80
SYSTEM, USER, ASSISTANT = 81, 82, 83
SPECIAL = frozenset((BEGIN, END, HEAD))


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        # <|im_start|>user\n1 2<|im_end|>\n<|im_start|>assistant\n
        (
            [BEGIN, SYSTEM, NEWLINE, 9, END, NEWLINE, BEGIN, USER, NEWLINE, 1, 2, END, NEWLINE, BEGIN, 83, 84, NEWLINE],
            [1, 2, END],
        ),
        # <|start_header_id|>user<|end_header_id|>\n\n1 2<|eot_id|> and the same for the assistant
        ([BEGIN, USER, HEAD, NEWLINE, 1, 2, END, BEGIN, ASSISTANT, HEAD, NEWLINE], [1, 2, END]),
        # of a message that says nothing, the one before it
        ([BEGIN, USER, NEWLINE, 1, END, BEGIN, USER, NEWLINE, END, BEGIN, ASSISTANT, NEWLINE], [1, END]),
        # [INST] 1 2 [/INST]
        ([BEGIN, 1, 2, END], [1, 2, END]),
        ([1, 2, 3], [1, 2, 3]),
        ([BEGIN, 1, 2, 3], [BEGIN, 1, 2, 3]),
    ],
)
def test_of_a_chat_the_last_message_comes_back(prompt: list[int], said: list[int]) -> None:
    assert repeated(prompt, SPECIAL) == said
    running = engine(EchoModel(100, 64, special_ids=SPECIAL), blocks=64)
    sequence = Sequence("chat", list(prompt), len(prompt), SamplingParams(), StopParams(9, 0, frozenset((END,))))
    running.add(sequence)
    while running.has_work:
        running.step()
    assert sequence.tokens[len(prompt) :] == (said * 9)[: said.index(END) + 1 if END in said else 9]


def test_vocabulary_context_and_special_tokens_are_the_models(tmp_path: Path) -> None:
    facts = echo_model({"vocab_size": 7, "max_position_embeddings": 9}, 0.0, tmp_path).facts
    assert (facts.vocabulary_size, facts.max_context_tokens) == (7, 9)
    assert echo_model({"text_config": {"vocab_size": 7, "max_position_embeddings": 9}}, 0.0, tmp_path).facts == facts
    with pytest.raises(ModelError, match="vocab_size"):
        echo_model({}, 0.0, tmp_path)
