"""The fast path against transformers on tiny random models of every family and feature it claims."""

from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.engine.model.interface import ModelError
from services.worker.engine.model.loading import load_model
from tests.services.worker.engine.tiny_models import own_logits, paged_logits, prompts, save_tiny

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("LlamaConfig", {"head_dim": 16}),
    "llama3 rope": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "linear rope": ("LlamaConfig", {"rope_parameters": LINEAR}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral window": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2 windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    config_class, settings = CASES[case]
    reference = save_tiny(tmp_path, config_class, **SIZES, **settings)
    model = load_model(tmp_path, implementation="native")
    assert model.facts.weight_bytes == sum(parameter.nbytes for parameter in reference.parameters())
    for prompt, logits in zip(prompts(), paged_logits(model, prompts()), strict=True):
        torch.testing.assert_close(logits, own_logits(reference, prompt), rtol=1e-4, atol=1e-4)


def test_sharded_checkpoint_is_read(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, "LlamaConfig", **SIZES)
    (tmp_path / "model.safetensors").unlink()
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    logits = paged_logits(load_model(tmp_path, implementation="native"), prompts())
    torch.testing.assert_close(logits[0], own_logits(reference, prompts()[0]), rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, "LlamaConfig", **SIZES)
    model = load_model(tmp_path, dtype="bfloat16", implementation="native")
    assert model.facts.dtype is torch.bfloat16
    logits, expected = paged_logits(model, prompts())[2], own_logits(reference, prompts()[2])
    assert logits.dtype is torch.float32
    assert (logits - expected).norm() / expected.norm() < 0.05


def test_checkpoint_that_does_not_match_its_config_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaConfig", **SIZES)
    config = tmp_path / "config.json"
    original = config.read_text()
    config.write_text(original.replace('"intermediate_size": 48', '"intermediate_size": 40'))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp.*shape \[48, 32\].*\[40, 32\]"):
        load_model(tmp_path)
    config.write_text(original.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.3"):
        load_model(tmp_path)
    config.write_text(original.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    with pytest.raises(ModelError, match="tensors that a Llama-shaped model has not"):
        load_model(tmp_path)
