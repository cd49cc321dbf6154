"""What a model's steps need of the machine, and how that is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.paged_kv import LayerShape
from services.worker.engine.model.interface import ModelFacts, Quantization
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams
from services.worker.step_bounds import StepNeeds, describe_bounds, make_probes, step_needs
from tests.services.worker.engine.kernels.compiled.calling import ISA

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "max_position_embeddings": 64,
}
WEIGHTS = 2 * (3 * 64 * 64 + 64 * 64 + 3 * 64 * 64) + 64 * 64  # no matrix has columns that a panel has to add
COLUMNS = 2 * (3 * 64 + 64 + 2 * 64 + 64) + 64
AVX512 = Isa("avx512", lanes=16, accumulators=24, vnni=True, byte_pairs=False, bfloat16_dots=False)
AVX512_BF16 = Isa("avx512_bf16", lanes=16, accumulators=24, vnni=True, byte_pairs=False, bfloat16_dots=True)


def needs_of(folder: Path, isa: Isa, dtype: torch.dtype, quantization: Quantization = "none") -> StepNeeds:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    facts = ModelFacts("compiled", 64, 64, (LayerShape(1, 64, 64),) * 2, 0, dtype, torch.device("cpu"), quantization)
    return step_needs(folder, facts, isa)


def decode(context: int) -> Batch:
    sequence = Sequence("key", [1] * context, context, SamplingParams(), StopParams(max_tokens=1))
    return Batch((Slice(sequence, context - 1, 1),))


def test_in_bfloat16_weights_and_keys_meet_in_one_kind_of_product(tmp_path: Path) -> None:
    needs = needs_of(tmp_path, AVX512_BF16, torch.bfloat16).of(decode(10))
    assert needs == {"memory": 2 * WEIGHTS + 10 * 2 * 2 * 64 * 2, "bfloat16": WEIGHTS + 2 * 10 * 2 * 64}


def test_quantized_weights_are_multiplied_as_bytes_and_keys_as_what_they_are(tmp_path: Path) -> None:
    needs = needs_of(tmp_path, AVX512, torch.float32, "int8").of(decode(10))
    with_scales = WEIGHTS + 4 * COLUMNS
    assert needs == {"memory": with_scales + 10 * 2 * 2 * 64 * 4, "bytes": WEIGHTS, "float32": 2 * 10 * 2 * 64}


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_there_is_a_probe_for_everything_that_a_step_needs(tmp_path: Path, quantization: Quantization) -> None:
    needs = needs_of(tmp_path, ISA, torch.float32, quantization)
    probes = make_probes(needs, ISA, threads=2)
    assert probes.keys() == needs.of(decode(3)).keys()
    for probe in probes.values():
        assert probe.run() and probe.amount > 0


def test_shares_of_a_step() -> None:
    needs = {"memory": 8 * 10**9, "bytes": 10 * 10**9, "float32": 5 * 10**9}
    rates = {"memory": 40e9, "bytes": 200e9, "float32": 50e9}
    told = describe_bounds(needs, rates, step_s=0.25)
    assert told.split() == "memory 40.0 GB/s: 80% products 200 G bytes/s and 50 G float32/s: 60%".split()
