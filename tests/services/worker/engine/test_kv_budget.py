from pathlib import Path

import pytest
import torch

from services.worker.engine import kv_budget
from services.worker.engine.kv_budget import available_memory_bytes, plan_num_blocks
from services.worker.engine.model.interface import ModelError

GIB = 2**30


def plan(*, kv_blocks: int | None = None, fraction: float = 0.5, available: int = 9 * GIB, length: int = 1600) -> int:
    return plan_num_blocks(
        kv_blocks=kv_blocks,
        memory_fraction=fraction,
        available_bytes=available,
        weight_bytes=GIB,
        block_bytes=GIB // 68,
        layers=48,
        block_size=16,
        max_model_len=length,
    )


def test_a_given_number_is_taken() -> None:
    assert plan(kv_blocks=100) == 100


def test_a_fraction_of_what_was_free_before_the_weights_minus_the_weights_and_room_to_compute() -> None:
    # A block is 1/68 GiB, and 3/48 of that beside it makes 1/64.
    assert plan(fraction=0.5) == 4 * 64
    assert plan(fraction=0.9) == 8 * 64


def test_a_pool_that_cannot_hold_one_full_sequence_is_refused_with_the_numbers() -> None:
    with pytest.raises(ModelError, match=r"1601 tokens needs 101 KV blocks.*kv_blocks is 100.*at most 1600\."):
        plan(kv_blocks=100, length=1601)
    with pytest.raises(ModelError, match=r"50% of 2\.00 GiB free memory minus 1\.00 GiB of weights holds 0 KV blocks"):
        plan(available=GIB)


def test_a_cgroup_limits_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    monkeypatch.setattr(kv_budget, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(kv_budget, "CGROUP", tmp_path)
    cpu = torch.device("cpu")
    assert available_memory_bytes(cpu) == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes(cpu) == 5000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert available_memory_bytes(cpu) == 2_000_000
    (tmp_path / "memory.stat").write_text("active_file 7\ninactive_file 600000\n")
    assert available_memory_bytes(cpu) == 2_600_000
