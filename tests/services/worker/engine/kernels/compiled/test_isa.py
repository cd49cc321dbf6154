"""Each instruction set that the machine has is used when it is asked for, and gives the right results."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import pytest

from services.worker.engine.kernels.compiled import isa
from services.worker.engine.kernels.compiled.isa import IsaName, choose_isa, may_use_matrices
from services.worker.engine.model.interface import ModelError
from services.worker.engine.model.loading import load_model
from tests.services.worker.engine.tiny_models import save_tiny

HOST = llvm.get_host_cpu_features()
AVX2 = ("avx2", "fma", "f16c")
WIDE = ("amx", "avx512_bf16", "avx512")
AMX = ("amx-tile", "amx-bf16", "amx-int8")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")


def has(features: tuple[str, ...]) -> bool:
    return all(HOST.get(feature) for feature in features)


# What the machine lacks is no case here, rather than a case that is skipped.
PRESENT: list[IsaName] = ["baseline"]
PRESENT += ["avx2"] if has(AVX2) else []
PRESENT += ["avx512"] if has(AVX512) else []
PRESENT += ["avx512_bf16"] if has((*AVX512, "avx512bf16")) else []
PRESENT += ["amx"] if has((*AVX512, "avx512bf16", *AMX)) and may_use_matrices() else []

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "attention_bias": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny(path, "LlamaConfig", **SIZES)
    return path


@pytest.fixture(scope="module")
def programs(folder: Path) -> Iterator[dict[IsaName, subprocess.Popen[str]]]:
    """One process for each instruction set, since numba compiles for one kind of processor per process."""
    module = "tests.services.worker.engine.kernels.compiled.isa_program"
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", module, name, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
        )
        for name in PRESENT
    }
    yield running
    for program in running.values():
        program.kill()
        program.communicate()


@pytest.mark.parametrize("name", PRESENT)
@pytest.mark.timeout(1200)  # two minutes are usual, most of them for the compiler; a busy machine takes longer
def test_an_instruction_set_is_used_and_computes_right(
    name: IsaName, programs: dict[IsaName, subprocess.Popen[str]]
) -> None:
    output, errors = programs[name].communicate()
    assert programs[name].returncode == 0, errors
    results = json.loads(output)
    assert set(results) == {"float32", "bfloat16", "int8", "int4 bfloat16"}
    for precision, result in results.items():
        assert result["instruction_set"] == name
        assert result["invariant"]
        assert result["best error"] < 3e-5
        assert result["worst error"] < {"float32": 1e-4, "bfloat16": 2e-2}.get(precision, 0.1)
        assert result["xmm"] > 0
        assert (result.get("zmm", 0) > 0) == (name in WIDE)
        assert (result.get("tmm", 0) > 0) == (name == "amx" and precision != "float32")
        assert (result.get("ymm", 0) > 0) or name != "avx2"
        assert (result["avx"] > 0) == (name != "baseline")
        if name == "baseline":
            assert "ymm" not in result
        by_vnni = ("int4 bfloat16",) if name == "amx" else ("int8", "int4 bfloat16")
        vnni = name in WIDE and bool(HOST.get("avx512vnni"))
        assert (result["byte dots"] > 0) == (vnni and precision in by_vnni)
        assert (result["bfloat16 dots"] > 0) == (name == "avx512_bf16" and precision.endswith("bfloat16"))
        assert (result["matrix products"] > 0) == (name == "amx" and precision.endswith("bfloat16"))
        assert (result["byte matrices"] > 0) == (name == "amx" and precision.startswith("int"))  # int4's head, too


def test_auto_takes_the_best() -> None:
    best = choose_isa()
    assert best.name == PRESENT[-1]
    assert best.lanes == {"avx2": 8, "baseline": 4}.get(best.name, 16)
    assert best.panel_columns == 2 * best.lanes
    assert best.vnni == (best.lanes == 16 and bool(HOST.get("avx512vnni")))
    assert best.bfloat16_dots == (best.name in ("amx", "avx512_bf16"))
    assert best.matrices == (best.name == "amx")


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("amx", "amx-tile"),
        ("amx", "amx-bf16"),
        ("amx", "amx-int8"),
        ("amx", "avx512bf16"),
        ("avx512_bf16", "avx512bf16"),
        ("avx512", "avx512bw"),
        ("avx512", "f16c"),
        ("avx2", "fma"),
    ],
)
def test_what_the_machine_lacks_is_refused(
    name: IsaName, lacking: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = llvm.get_host_cpu_features()
    features.update({feature: feature != lacking for feature in (*AVX512, "avx512bf16", *AMX)})
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: "oldlake")
    with pytest.raises(
        ModelError, match=rf"^The instruction set cannot be had: this processor \(oldlake\) has no {name}\.$"
    ):
        load_model(folder, instruction_set=name)


def test_amx_that_the_system_does_not_grant_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = llvm.get_host_cpu_features()
    features.update(dict.fromkeys((*AVX512, "avx512bf16", *AMX), True))
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr(isa, "may_use_matrices", lambda: False)
    assert choose_isa().name == "avx512_bf16"
    with pytest.raises(ModelError, match=r"cannot be had: the system grants no room for the registers of amx\.$"):
        load_model(folder, instruction_set="amx")
