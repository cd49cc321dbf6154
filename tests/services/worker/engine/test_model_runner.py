from pathlib import Path

import pytest
import torch

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.model.interface import ModelError
from services.worker.engine.model.loading import load_model
from services.worker.engine.model_runner import build_model_runner
from tests.services.worker.engine.model.test_llama import SIZES
from tests.services.worker.engine.tiny_models import VOCABULARY, make_sequence, own_logits, save_tiny


def test_forward_gives_float32_logits_for_the_slices_that_sample(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, "LlamaConfig", **SIZES)
    runner = build_model_runner(load_model(tmp_path), block_size=4, kv_blocks=40)
    runner.warm_up()
    done, begun = make_sequence([5, 6, 7], [0]), make_sequence([8, 9, 10, 11, 12], [1, 2])
    logits = runner.forward(Batch((Slice(begun, 0, 3), Slice(done, 0, 3))))
    assert logits.shape == (1, VOCABULARY)
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits[0], own_logits(reference, [5, 6, 7]), rtol=1e-4, atol=1e-4)
    assert runner.forward(Batch((Slice(begun, 3, 1),))).shape == (0, VOCABULARY)


def test_nan_in_the_pool_reaches_no_sequence_that_does_not_own_it(tmp_path: Path) -> None:
    """One request's overflow must not end in another's answer, beside it or after it in the same blocks."""
    reference = save_tiny(tmp_path, "LlamaConfig", **SIZES)
    runner = build_model_runner(load_model(tmp_path), block_size=4, kv_blocks=40)
    runner.kv.storage.fill_(torch.nan)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20] * 16]
    sequences = [make_sequence(prompts[0], [3, 4, 5]), make_sequence(prompts[1], [6, 7, 8, 9])]
    runner.forward(Batch(tuple(Slice(sequence, 0, len(sequence.tokens) - 1) for sequence in sequences)))
    logits = runner.forward(Batch(tuple(Slice(sequence, len(sequence.tokens) - 1, 1) for sequence in sequences)))
    for ours, prompt in zip(logits, prompts, strict=True):
        torch.testing.assert_close(ours, own_logits(reference, prompt), rtol=1e-4, atol=1e-4)


def test_the_runner_tells_its_sizes(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaConfig", **SIZES)
    runner = build_model_runner(load_model(tmp_path), block_size=4, kv_blocks=40, max_model_len=100)
    assert (runner.num_blocks, runner.block_size, runner.max_model_len) == (40, 4, 100)
    assert runner.block_bytes == 3 * 2 * 2 * 8 * 4 * 4  # layers, K and V, KV heads, head_dim, tokens, bytes
    assert runner.vocabulary_size == VOCABULARY
    assert runner.device == torch.device("cpu")


def test_a_context_beyond_the_models_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaConfig", **SIZES)
    with pytest.raises(ModelError, match="max_model_len 129 must lie between 1 and the model's 128"):
        build_model_runner(load_model(tmp_path), kv_blocks=40, max_model_len=129)
    with pytest.raises(ModelError, match="128 tokens needs 8 KV blocks"):
        build_model_runner(load_model(tmp_path), kv_blocks=7)
