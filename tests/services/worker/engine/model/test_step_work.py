"""The least work of a step against counting it by hand."""

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.model.llama_config import parse_llama_config
from services.worker.engine.model.step_work import StepWork, step_work
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams

CONFIG = {
    "model_type": "mistral",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "sliding_window": None,
}
IN_LAYERS = 3 * (32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48)  # QKV, output, gate, up and down
HEAD = 32 * 100


def work_of(*parts: tuple[int, int, int], window: int | None = None) -> StepWork:
    """Of slices (start, length, tokens of the sequence)."""
    slices = [
        Slice(Sequence(number, [1] * tokens, tokens, SamplingParams(), StopParams(max_tokens=1)), start, length)
        for number, (start, length, tokens) in enumerate(parts)
    ]
    config = parse_llama_config({**CONFIG, "sliding_window": window})
    return step_work(config, Batch(tuple(slices)), weight_bytes=1000, kv_element_bytes=2)


def test_a_decode_reads_all_weights_and_its_context_once() -> None:
    of_key = 3 * 2 * 16 * 2  # in three layers, with its value
    assert work_of((9, 1, 10)) == StepWork(1000 + 10 * of_key, IN_LAYERS + HEAD, 3 * 10 * 2 * 32)


def test_sequences_share_the_weights_and_not_their_contexts() -> None:
    of_key = 3 * 2 * 16 * 2
    assert work_of((9, 1, 10), (3, 1, 4)) == StepWork(1000 + 14 * of_key, 2 * (IN_LAYERS + HEAD), 3 * 14 * 2 * 32)


def test_tokens_of_a_prompt_see_those_before_them_and_only_the_last_one_samples() -> None:
    assert work_of((2, 3, 5)).attention_products == 3 * (3 + 4 + 5) * 2 * 32
    assert work_of((2, 3, 5)).weight_products == 3 * IN_LAYERS + HEAD
    assert work_of((2, 3, 6)).weight_products == 3 * IN_LAYERS


def test_a_window_hides_what_is_far() -> None:
    work = work_of((2, 3, 5), window=4)
    assert work.attention_products == 3 * (3 + 4 + 4) * 2 * 32
    assert work.read_bytes == 1000 + 5 * 3 * 2 * 16 * 2
    assert work_of((9, 1, 10), window=4).read_bytes == 1000 + 4 * 3 * 2 * 16 * 2


def test_drafts_sample_too() -> None:
    sequence = Sequence(0, [1] * 10, 10, SamplingParams(), StopParams(max_tokens=9))
    work = step_work(
        parse_llama_config(CONFIG), Batch((Slice(sequence, 9, 3, (4, 5)),)), weight_bytes=0, kv_element_bytes=2
    )
    assert work.weight_products == 3 * (IN_LAYERS + HEAD)
