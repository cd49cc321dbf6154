"""What bounds a compiled model's step on this machine: how fast its threads read memory, and how fast they multiply.

To be imported when the model is loaded: numba settles the processor that it compiles for with the first kernel.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from services.worker.engine.batcher import Batch
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.multiplying import make_products
from services.worker.engine.kernels.compiled.reading import read_memory
from services.worker.engine.model.checkpoint import read_config
from services.worker.engine.model.interface import ModelFacts
from services.worker.engine.model.llama_config import LlamaConfig, parse_llama_config
from services.worker.engine.model.packed_weights import matrix_bytes, weight_bits
from services.worker.engine.model.step_work import step_work

_READ_BYTES = 1 << 28
_KINDS = {8: "bytes", 16: "bfloat16", 32: "float32"}


@dataclass(frozen=True, slots=True)
class Probe:
    """Something that the machine does as fast as it can, `amount` of it each time."""

    run: Callable[[], object]
    amount: int  # bytes, or multiply-adds


@dataclass(frozen=True, slots=True)
class StepNeeds:
    """How a model's steps use memory and arithmetic."""

    config: LlamaConfig
    weight_bytes: int
    kv_element_bytes: int
    weight_bits: int
    weight_kind: str  # of the numbers that are multiplied with weights, one of _KINDS
    attention_kind: str

    def of(self, batch: Batch) -> dict[str, int]:
        """Bytes of `memory`, and multiply-adds by kind."""
        work = step_work(self.config, batch, weight_bytes=self.weight_bytes, kv_element_bytes=self.kv_element_bytes)
        needs = dict.fromkeys(("memory", self.weight_kind, self.attention_kind), 0)
        needs["memory"] = work.read_bytes
        needs[self.weight_kind] += work.weight_products
        needs[self.attention_kind] += work.attention_products
        return needs


def step_needs(folder: Path, facts: ModelFacts, isa: Isa) -> StepNeeds:
    """Of the compiled model in `folder`."""
    config = parse_llama_config(read_config(folder))
    bits, head_bits = weight_bits(facts.dtype, facts.quantization)
    return StepNeeds(
        config,
        weight_bytes=matrix_bytes(config, isa, bits, head_bits),
        kv_element_bytes=facts.dtype.itemsize,
        weight_bits=bits,
        weight_kind=_KINDS[isa.activation_bits(bits)],
        attention_kind=_KINDS[isa.activation_bits(8 * facts.dtype.itemsize)],
    )


def make_probes(needs: StepNeeds, isa: Isa, threads: int) -> dict[str, Probe]:
    """By the same names as the needs; each uses so many threads."""
    pool, memory = ThreadPoolExecutor(threads), np.ones(_READ_BYTES, np.uint8)
    probes = {"memory": Probe(partial(read_memory, memory, pool, threads), _READ_BYTES)}
    of_keys = needs.attention_kind, 8 * needs.kv_element_bytes
    for kind, bits in ((needs.weight_kind, needs.weight_bits), of_keys):
        multiply = partial(make_products(isa, bits), pool, threads)
        probes[kind] = Probe(multiply, multiply())
    return probes


def describe_bounds(needs: Mapping[str, int], rates: Mapping[str, float], step_s: float) -> str:
    """The machine's rates, per second, and what share of the step's time each alone would take for its needs."""
    shares = {name: needs[name] / rate / step_s for name, rate in rates.items()}
    memory = shares.pop("memory")
    products = " and ".join(f"{rates[kind] / 1e9:.0f} G {kind}/s" for kind in shares)
    return f"memory {rates['memory'] / 1e9:5.1f} GB/s: {memory:4.0%}   products {products}: {sum(shares.values()):4.0%}"
