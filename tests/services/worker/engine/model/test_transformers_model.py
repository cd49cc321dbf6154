"""The general path on tiny random models of other families, against their own forward; and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.engine.model import transformers_model
from services.worker.engine.model.interface import ModelError
from services.worker.engine.model.loading import load_model
from tests.services.worker.engine.tiny_models import own_logits, paged_logits, prompts, save_tiny

LLAMA_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
NEOX_SIZES = {key: value for key, value in LLAMA_SIZES.items() if key != "num_key_value_heads"}
GEMMA_SIZES = LLAMA_SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
MOE_SIZES = LLAMA_SIZES | {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
CASES: dict[str, dict[str, Any]] = {
    "LlamaConfig": LLAMA_SIZES,
    "MistralConfig": LLAMA_SIZES | {"sliding_window": 7},
    "GPT2Config": GPT2_SIZES,
    "GPTNeoXConfig": NEOX_SIZES,
    "Gemma2Config": GEMMA_SIZES | {"attn_logit_softcapping": 2.0},
    "Gemma3TextConfig": GEMMA_SIZES | {"layer_types": ["sliding_attention", "full_attention"]},
    "PhiConfig": NEOX_SIZES,
    "Phi3Config": LLAMA_SIZES | {"sliding_window": 9, "pad_token_id": 0},
    "Qwen2MoeConfig": MOE_SIZES,
    "OPTConfig": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 128,
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "BloomConfig": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "attention interface"),
    "MambaConfig": ({"hidden_size": 32, "num_hidden_layers": 2}, "attention interface|attention layers"),
    "GptOssConfig": (
        LLAMA_SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        "attention sinks",
    ),
}


@pytest.mark.parametrize("config_class", CASES)
def test_logits_equal_the_models_own(config_class: str, tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, config_class, **CASES[config_class])
    model = load_model(tmp_path, implementation="transformers")
    assert model.facts.implementation == "transformers"
    for prompt, logits in zip(prompts(), paged_logits(model, prompts()), strict=True):
        torch.testing.assert_close(logits, own_logits(reference, prompt), rtol=1e-4, atol=1e-4)


def test_longrope_serves_only_what_its_short_factors_are_for(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    settings = LLAMA_SIZES | {"pad_token_id": 0, "original_max_position_embeddings": 32, "rope_parameters": rope}
    save_tiny(tmp_path, "Phi3Config", **settings)
    assert load_model(tmp_path).facts.max_context_tokens == 32


def test_weights_that_the_checkpoint_does_not_fill_are_refused(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "PhiConfig", **NEOX_SIZES)
    model.model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"checkpoint lacks lm_head\.bias, lm_head\.weight"):
        load_model(tmp_path)
    config = tmp_path / "config.json"
    save_tiny(tmp_path, "PhiConfig", **NEOX_SIZES)
    config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 40'))
    with pytest.raises(ModelError, match=r"has in another shape model\.layers\.0\.mlp\.fc1\.bias, .* and 3 more\.$"):
        load_model(tmp_path)


def test_what_a_models_code_raises_becomes_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_model: object) -> None:
        raise TypeError

    save_tiny(tmp_path, "GPT2Config", **GPT2_SIZES)
    monkeypatch.setattr(transformers_model, "examine", broken)
    with pytest.raises(ModelError, match=r"transformers cannot run it: TypeError\.$"):
        load_model(tmp_path)


@pytest.mark.parametrize("config_class", REFUSED)
def test_models_that_cannot_be_paged_are_refused_with_the_reason(config_class: str, tmp_path: Path) -> None:
    settings, reason = REFUSED[config_class]
    save_tiny(tmp_path, config_class, **settings)
    with pytest.raises(ModelError, match=reason):
        load_model(tmp_path)
