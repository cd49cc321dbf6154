"""Which path a folder takes, and the sentences with which it is refused."""

import json
from pathlib import Path

import pytest
import torch

from services.worker.engine.model.checkpoint import weight_files
from services.worker.engine.model.interface import ModelError
from services.worker.engine.model.loading import load_model
from tests.services.worker.engine.model.test_llama import SIZES
from tests.services.worker.engine.tiny_models import own_logits, paged_logits, prompts, save_tiny

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 64}


def test_auto_takes_the_fast_path_where_it_can(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaConfig", **SIZES)
    facts = load_model(tmp_path).facts
    assert facts.implementation == "native"
    assert facts.dtype is torch.float32
    assert facts.max_context_tokens == 128


def test_auto_takes_the_general_path_for_what_the_fast_path_lacks(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, "LlamaConfig", **SIZES, rope_parameters=YARN)
    model = load_model(tmp_path)
    assert model.facts.implementation == "transformers"
    logits = paged_logits(model, prompts())
    torch.testing.assert_close(logits[3], own_logits(reference, prompts()[3]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match=r"fast path cannot run .*: rope type 'yarn'"):
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaConfig", **SIZES)
    with pytest.raises(ModelError, match="finds no CUDA device"):
        load_model(tmp_path, device="cuda")
