from typing import Any

import pytest

from services.worker.engine.model.interface import ModelError
from services.worker.engine.model.llama_config import NotLlamaShaped, parse_llama_config

CONFIG = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def test_absent_keys_take_the_familys_defaults() -> None:
    config = parse_llama_config(CONFIG)
    assert (config.kv_heads, config.head_dim, config.tied_embeddings) == (4, 8, False)
    assert config.rope["rope_type"] == "default"
    assert config.rope["rope_theta"] == 10_000.0
    assert config.windows == (None, None, None)
    assert parse_llama_config(CONFIG | {"model_type": "qwen3"}).head_dim == 128


@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 4), ("mistral", 8), ("qwen2", 32), ("qwen3", 32)])
def test_kv_heads_that_are_absent_and_not_null_take_the_familys_default(family: str, kv_heads: int) -> None:
    assert parse_llama_config(CONFIG | {"model_type": family}).kv_heads == kv_heads
    assert parse_llama_config(CONFIG | {"model_type": family, "num_key_value_heads": None}).kv_heads == 4


def test_older_files_keep_rope_in_two_places() -> None:
    older = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    rope = parse_llama_config(CONFIG | older).rope
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("linear", 5e5, 4.0)


def test_qwen2_ignores_its_window_unless_it_is_switched_on() -> None:
    qwen = CONFIG | {"model_type": "qwen2", "sliding_window": 16, "max_window_layers": 2}
    assert parse_llama_config(qwen | {"use_sliding_window": False}).windows == (None, None, None)
    assert parse_llama_config(qwen | {"use_sliding_window": True}).windows == (None, None, 16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not Llama-shaped"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "a part of each head"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3}, "layer types are chunked_attention"),
    ],
)
def test_what_the_fast_path_lacks_is_named(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotLlamaShaped, match=reason):
        parse_llama_config(CONFIG | change)


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ModelError, match="must have 'vocab_size'"):
        parse_llama_config({key: value for key, value in CONFIG.items() if key != "vocab_size"})
