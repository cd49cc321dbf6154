"""How much memory this worker's model runs in has in use."""

import resource
from collections.abc import Callable
from pathlib import Path

import torch
from prometheus_client import REGISTRY, CollectorRegistry, Gauge

_STATM = Path("/proc/self/statm")


def show_memory(device: torch.device, registry: CollectorRegistry = REGISTRY) -> None:
    """Registers `llm_gpu_memory_bytes`: of a GPU all that is in use on it, by whomever; on a CPU, under the id `cpu`,
    what of this process lies in main memory.
    """
    gauge = Gauge(
        "llm_gpu_memory_bytes",
        "Memory in use, B: of a GPU by all its processes; gpu_id cpu: of main memory by this one.",
        ["gpu_id"],
        registry=registry,
    )
    gauge.labels(_id(device)).set_function(_used(device))


def _id(device: torch.device) -> str:
    return str(device.index or 0) if device.type == "cuda" else device.type


def _used(device: torch.device) -> Callable[[], float]:
    return (lambda: _used_of_gpu(device)) if device.type == "cuda" else _resident


def _used_of_gpu(device: torch.device) -> float:
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _resident() -> float:
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()
