"""How many KV blocks a worker gets: as told, or what a share of the free memory holds."""

from pathlib import Path

import torch

from services.worker.engine.model.interface import ModelError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")

WORKING_COPIES = 3  # of one layer's keys and values


def plan_num_blocks(
    *,
    kv_blocks: int | None,
    memory_fraction: float,
    available_bytes: int,
    weight_bytes: int,
    block_bytes: int,
    layers: int,
    block_size: int,
    max_model_len: int,
) -> int:
    """`kv_blocks` if given, else the blocks that fit into `memory_fraction` of the memory, minus the weights.

    Beside each block stays room for what a layer takes while it runs: the block's part in that layer gathered, laid out
    anew, and as much again for activations.
    `available_bytes` is what is free now, with the weights already loaded. Raises ModelError when one sequence of
    `max_model_len` tokens would not fit: it could never finish.
    """
    needed = -(-max_model_len // block_size)
    if kv_blocks is not None:
        blocks, source = kv_blocks, f"kv_blocks is {kv_blocks}"
    else:
        budget = int((available_bytes + weight_bytes) * memory_fraction) - weight_bytes
        blocks = max(budget, 0) // (block_bytes + WORKING_COPIES * block_bytes // layers)
        source = (
            f"{memory_fraction:.0%} of {_gib(available_bytes + weight_bytes)} free memory minus {_gib(weight_bytes)} "
            f"of weights holds {blocks} KV blocks with room to compute"
        )
    if blocks < needed:
        raise ModelError(
            f"One sequence of {max_model_len} tokens needs {needed} KV blocks of {block_size} tokens "
            f"({_gib(needed * block_bytes)}), but {source}: raise kv_blocks or the memory fraction, or lower "
            f"max_model_len to at most {blocks * block_size}."
        )
    return blocks


def available_memory_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`; for the CPU, within the limit of this process's cgroup."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    free = _meminfo_available()
    limit = _cgroup_number("memory.max")
    if limit is not None:
        free = min(free, limit - (_cgroup_number("memory.current") or 0) + _cgroup_reclaimable())
    return max(free, 0)


def _meminfo_available() -> int:
    for line in MEMINFO.read_text().splitlines():
        name, value = line.split(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise ModelError(f"{MEMINFO} does not say how much memory is available: set kv_blocks.")


def _cgroup_number(name: str) -> int | None:
    """A number of the (version 2) cgroup that this process sees as its root; none where there is no limit."""
    try:
        text = (CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _cgroup_reclaimable() -> int:
    """Bytes of file cache that the cgroup is charged for and the kernel drops first, such as a checkpoint just read."""
    try:
        entries = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(entry.split()[1]) for entry in entries if entry.startswith("inactive_file ")), 0)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
