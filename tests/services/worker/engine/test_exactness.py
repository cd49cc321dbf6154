"""Greedy tokens of the engine equal those of transformers' generate in float32, however the work is cut up.

The references are in a file (`make_reference.py` writes it); two of them are checked against transformers here. Each
case proves by a counter that what it is named after happened.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from services.worker.engine.batcher import Batcher
from services.worker.engine.batching_policy import ContinuousBatching
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.engine import Engine
from services.worker.engine.model.interface import CausalModel
from services.worker.engine.model.loading import Implementation, load_model
from services.worker.engine.model_runner import build_model_runner
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams
from tests.services.worker.engine.make_reference import OUTPUT_TOKENS, REFERENCE_FILE, generate, load_reference_model

REFERENCE: list[dict[str, list[int]]] = json.loads(REFERENCE_FILE.read_text())
CONTEXT = 704  # the longest prompt and its output, in whole blocks
PLENTY_OF_BLOCKS = 512
EVERYONE = range(len(REFERENCE))

pytestmark = pytest.mark.timeout(600)  # a minute is usual; a busy machine takes many times that


@pytest.fixture(scope="module", params=["compiled", "native", "transformers"])
def model(request: pytest.FixtureRequest, default_model: Path) -> CausalModel:
    implementation: Implementation = request.param
    loaded = load_model(default_model, dtype="float32", implementation=implementation)
    assert loaded.facts.implementation == implementation
    return loaded


def make_engine(
    model: CausalModel,
    *,
    blocks: int = PLENTY_OF_BLOCKS,
    max_sequences: int = 16,
    max_batch_tokens: int = 512,
    speculative_rows: int = 0,
) -> Engine:
    runner = build_model_runner(model, kv_blocks=blocks, max_model_len=CONTEXT)
    pool = BlockPool(runner.num_blocks, runner.block_size)
    batcher = Batcher(
        pool,
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
        policy=ContinuousBatching(),
        speculative_rows=speculative_rows,
    )
    return Engine(runner, pool, batcher, max_context=CONTEXT)


def add(engine: Engine, which: Iterable[int]) -> list[Sequence]:
    sequences = []
    for index in which:
        prompt = REFERENCE[index]["prompt"]
        sequence = Sequence(
            key=index,
            tokens=list(prompt),
            prompt_length=len(prompt),
            sampling=SamplingParams(temperature=0.0),
            stop=StopParams(max_tokens=OUTPUT_TOKENS),
        )
        engine.add(sequence)
        sequences.append(sequence)
    return sequences


def run(engine: Engine) -> int:
    """Steps until all is done; the most sequences that ran together."""
    together = 0
    while engine.has_work:
        engine.step()
        together = max(together, engine.num_running)
    return together


def assert_exact(sequences: list[Sequence]) -> None:
    wrong = {
        sequence.key: sequence.tokens[sequence.prompt_length :]
        for sequence in sequences
        if sequence.tokens[sequence.prompt_length :] != REFERENCE[sequence.key]["output"]  # type: ignore[call-overload]
    }
    assert not wrong


def test_references_vary_in_length() -> None:
    lengths = sorted(len(entry["prompt"]) for entry in REFERENCE)
    assert len(lengths) == 20
    assert lengths[0] == 1
    assert lengths[-1] > 500
    assert all(len(entry["output"]) == OUTPUT_TOKENS for entry in REFERENCE)


def test_references_are_what_transformers_generates(default_model: Path) -> None:
    reference_model = load_reference_model(default_model)
    for index in (3, len(REFERENCE) - 1):
        output, _ = generate(reference_model, REFERENCE[index]["prompt"])
        assert output == REFERENCE[index]["output"]


def test_alone(model: CausalModel) -> None:
    engine = make_engine(model, max_sequences=1)
    sequences = add(engine, EVERYONE)
    assert run(engine) == 1
    assert_exact(sequences)


def test_sixteen_at_once(model: CausalModel) -> None:
    engine = make_engine(model)
    sequences = add(engine, EVERYONE)
    assert run(engine) == 16
    assert_exact(sequences)


def test_chunked_prefill_at_a_tiny_budget(model: CausalModel) -> None:
    engine = make_engine(model, max_batch_tokens=48)
    sequences = add(engine, EVERYONE)
    run(engine)
    assert engine.counters.prefill_chunks > len(sequences)
    assert_exact(sequences)


def test_preemption_in_a_tiny_pool(model: CausalModel) -> None:
    engine = make_engine(model, blocks=CONTEXT // 16)
    # Those that grow together out of the pool: the longest prompts would run alone in it.
    sequences = add(engine, [index for index in EVERYONE if len(REFERENCE[index]["prompt"]) < 200])
    run(engine)
    assert engine.counters.preemptions > 0
    assert_exact(sequences)


@pytest.mark.parametrize("model", ["compiled"], indirect=True)
@pytest.mark.parametrize("max_sequences", [1, 3])
def test_with_drafts(model: CausalModel, max_sequences: int) -> None:
    engine = make_engine(model, max_sequences=max_sequences, speculative_rows=8)
    sequences = add(engine, EVERYONE)
    run(engine)
    assert engine.counters.accepted_tokens > 200
    assert engine.counters.draft_tokens > engine.counters.accepted_tokens
    assert_exact(sequences)


def test_prefix_hits(model: CausalModel) -> None:
    engine = make_engine(model)
    run_first = add(engine, [max(EVERYONE, key=lambda index: len(REFERENCE[index]["prompt"]))])
    run(engine)
    assert engine.counters.prefix_hit_tokens == 0
    assert_exact(run_first)
    sequences = add(engine, EVERYONE)
    run(engine)
    assert engine.counters.prefix_hit_tokens > 1000
    assert_exact(sequences)
