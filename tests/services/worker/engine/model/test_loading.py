"""Which path a folder takes, and the sentences with which it is refused."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.kernels.compiled.isa import Isa, choose_isa
from services.worker.engine.kernels.paged_kv import PagedKV
from services.worker.engine.model.checkpoint import weight_files
from services.worker.engine.model.interface import ModelError, Quantization
from services.worker.engine.model.llama_config import parse_llama_config
from services.worker.engine.model.loading import load_model
from services.worker.engine.model.packed_weights import why_not_compiled
from tests.services.worker.engine.model.test_llama import SIZES
from tests.services.worker.engine.tiny_models import make_sequence, own_logits, paged_logits, prompts, save_tiny

COMPILABLE: dict[str, Any] = {**SIZES, "intermediate_size": 64, "head_dim": 16}
ISAS = (
    Isa("avx512", lanes=16, accumulators=24, vnni=True, byte_pairs=False, bfloat16_dots=False),
    Isa("avx2", lanes=8, accumulators=12, vnni=False, byte_pairs=True, bfloat16_dots=False),
    Isa("baseline", lanes=4, accumulators=12, vnni=False, byte_pairs=False, bfloat16_dots=False),
)
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 64}


def test_auto_takes_the_compiled_path_on_a_cpu(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, "LlamaConfig", **COMPILABLE)
    model = load_model(tmp_path)
    facts = model.facts
    assert (facts.implementation, facts.quantization) == ("compiled", "none")
    assert facts.instruction_set == choose_isa().name
    assert facts.dtype is torch.float32
    assert facts.max_context_tokens == 128
    sequence = make_sequence([5, 6, 7], [1])
    kv = PagedKV(facts.layer_shapes, 2, 16, facts.dtype, facts.device)
    [logits] = model.forward(Batch((Slice(sequence, 0, 3),)), kv)
    torch.testing.assert_close(logits, own_logits(reference, [5, 6, 7]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "request_", "reason"),
    [
        ({"intermediate_size": 48}, {}, r"sizes \(32, 48, 64\) are not all multiples of 32"),
        ({"head_dim": 18}, {}, r"head size 18 is no multiple of \d+"),
        ({}, {"block_size": 6}, r"block size 6 is no multiple of \d+, the \w+ vector"),
        ({}, {"dtype": "float16"}, r"torch\.float16 is neither float32 nor bfloat16"),
    ],
)
def test_auto_takes_the_native_path_for_what_cannot_be_compiled(
    sizes: dict[str, int],
    request_: dict[str, Any],
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_tiny(tmp_path, "LlamaConfig", **{**COMPILABLE, **sizes})
    with caplog.at_level(logging.INFO):
        facts = load_model(tmp_path, **request_).facts
    assert (facts.implementation, facts.quantization, facts.instruction_set) == ("native", "none", "")
    assert re.search(f"not compiled: .*{reason}", caplog.text)
    with pytest.raises(ModelError, match=rf"^The compiled path cannot run .*{reason}\.$"):
        load_model(tmp_path, implementation="compiled", **request_)


def test_vectors_decide_which_block_sizes_can_be_compiled() -> None:
    config = parse_llama_config({**COMPILABLE, "model_type": "llama", "vocab_size": 99})
    for isa in ISAS:
        for block_size in (4, 8, 16, 32):
            reason = why_not_compiled(config, isa, torch.float32, "none", block_size)
            expected = f"the block size {block_size} is no multiple of {isa.lanes}, the {isa.name} vector"
            assert reason == (None if block_size >= isa.lanes else expected)


def test_4_bits_need_heads_of_whole_groups(tmp_path: Path) -> None:
    config = parse_llama_config({**COMPILABLE, "model_type": "llama", "vocab_size": 99})
    assert why_not_compiled(config, ISAS[0], torch.float32, "none", 16) is None
    assert why_not_compiled(config, ISAS[0], torch.float32, "int8", 16) is None  # rounds whole rows
    assert why_not_compiled(config, ISAS[0], torch.float32, "int4", 16) == "the head size 16 is no multiple of 32"


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantizing_needs_the_compiled_path(quantize: Quantization, tmp_path: Path) -> None:
    """It is refused, rather than ignored, where another path would run the model."""
    save_tiny(tmp_path, "LlamaConfig", **{**SIZES, "head_dim": 2})
    sentence = rf"cannot run .*: .*{quantize} weights need the compiled path\.$"
    for implementation in ("native", "transformers"):
        with pytest.raises(ModelError, match=rf"^The {implementation} path {sentence}"):
            load_model(tmp_path, implementation=implementation, quantize=quantize)
    with pytest.raises(ModelError, match=rf"^The auto path {sentence}") as refused:
        load_model(tmp_path, quantize=quantize)
    assert "head size 2 is no multiple of" in str(refused.value)


def test_the_compiled_path_refuses_other_families(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaConfig", **COMPILABLE, rope_parameters=YARN)
    with pytest.raises(ModelError, match=r"^The compiled path cannot run .*: rope type 'yarn' is not one of"):
        load_model(tmp_path, implementation="compiled")


def test_auto_takes_the_general_path_for_what_the_fast_path_lacks(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, "LlamaConfig", **SIZES, rope_parameters=YARN)
    model = load_model(tmp_path)
    assert model.facts.implementation == "transformers"
    logits = paged_logits(model, prompts())
    torch.testing.assert_close(logits[3], own_logits(reference, prompts()[3]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match=r"The native path cannot run .*: rope type 'yarn'"):
        load_model(tmp_path, implementation="native")


def test_auto_dtype_is_the_checkpoints_but_for_float16_on_a_cpu(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "LlamaConfig", **SIZES)
    for stored, expected in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        model.to(stored).save_pretrained(tmp_path)
        assert load_model(tmp_path).facts.dtype is expected


def test_pickle_is_never_read(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaConfig", **SIZES)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    for implementation in ("native", "transformers"):
        with pytest.raises(ModelError, match=r"only pytorch_model\.bin: pickle can run code"):
            load_model(tmp_path, implementation=implementation)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaConfig", **SIZES)
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00002\.safetensors"):
        load_model(tmp_path)


def test_other_forms_of_the_weights_beside_the_usual_file_are_left_alone(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaConfig", **SIZES)
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_bad_requests_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_model(tmp_path)
    save_tiny(tmp_path, "LlamaConfig", **SIZES)
    with pytest.raises(ModelError, match="dtype 'int3'"):
        load_model(tmp_path, dtype="int3")
    with pytest.raises(ModelError, match="device 'tpu9'"):
        load_model(tmp_path, device="tpu9")


def test_a_cuda_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "LlamaConfig", **SIZES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match="'cuda:7' was asked for, but the last CUDA device is 1"):
        load_model(tmp_path, device="cuda:7")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaConfig", **SIZES)
    with pytest.raises(ModelError, match="finds no CUDA device"):
        load_model(tmp_path, device="cuda")
