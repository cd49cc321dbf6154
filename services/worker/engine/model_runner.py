"""Runs a model over the block pool's memory: a batch in, logits out.

Knows which rows sample and where KV goes; knows nothing of why these sequences run, of sampling, or of requests.
"""

import torch
from torch import Tensor

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.kernels.paged_kv import PagedKV, block_bytes
from services.worker.engine.kv_budget import available_memory_bytes, plan_num_blocks
from services.worker.engine.model.interface import CausalModel, ModelError, ModelFacts
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams

WARM_UP_TOKENS = 128


class ModelRunner:
    """A loaded model and its KV pool."""

    def __init__(self, model: CausalModel, kv: PagedKV, max_model_len: int) -> None:
        self._model = model
        self.kv = kv
        self.max_model_len = max_model_len  # tokens of the longest sequence, prompt and output together

    @property
    def facts(self) -> ModelFacts:
        return self._model.facts

    @property
    def vocabulary_size(self) -> int:
        return self.facts.vocabulary_size

    @property
    def num_blocks(self) -> int:
        return self.kv.num_blocks

    @property
    def block_size(self) -> int:
        return self.kv.block_size

    @property
    def block_bytes(self) -> int:
        return self.kv.block_bytes

    @property
    def weight_bytes(self) -> int:
        return self.facts.weight_bytes

    @property
    def device(self) -> torch.device:
        return self.facts.device

    @property
    def dtype(self) -> torch.dtype:
        return self.facts.dtype

    def read_block(self, block: int) -> memoryview:
        return self.kv.read(block)

    def write_block(self, block: int, data: bytes | memoryview) -> None:
        self.kv.write(block, data)

    def forward(self, batch: Batch) -> Tensor:
        """Computes the KV of every slice; float32 logits [rows that sample, vocabulary_size], in slice order."""
        self.kv.reach(max(block for piece in batch.slices for block in _written_blocks(piece, self.block_size)))
        return self._model.forward(batch, self.kv)

    def warm_up(self) -> None:
        """Runs a short prefill and a decode, so that the first request does not pay for first-time set-up.

        Writes into the first blocks: call it before the pool is in use.
        """
        length = min(WARM_UP_TOKENS, self.max_model_len, self.num_blocks * self.block_size)
        sequence = Sequence("warm-up", [0] * length, length, SamplingParams(), StopParams(max_tokens=1))
        sequence.blocks = list(range(-(-length // self.block_size)))
        self.forward(Batch((Slice(sequence, 0, length),)))
        self.forward(Batch((Slice(sequence, length - 1, 1),)))


def _written_blocks(piece: Slice, block_size: int) -> list[int]:
    return piece.sequence.blocks[piece.start // block_size : (piece.start + piece.length - 1) // block_size + 1]


def build_model_runner(
    model: CausalModel,
    *,
    block_size: int = 16,
    kv_blocks: int | None = None,
    memory_fraction: float = 0.5,
    max_model_len: int | None = None,
) -> ModelRunner:
    """A runner with `kv_blocks` blocks, or as many as `memory_fraction` of the device's memory holds.

    `max_model_len` lowers the context that the model was made for. Raises ModelError when the pool could not hold one
    sequence of that length.
    """
    facts = model.facts
    limit = facts.max_context_tokens if max_model_len is None else max_model_len
    if not 0 < limit <= facts.max_context_tokens:
        raise ModelError(f"max_model_len {limit} must lie between 1 and the model's {facts.max_context_tokens} tokens.")
    num_blocks = plan_num_blocks(
        kv_blocks=kv_blocks,
        memory_fraction=memory_fraction,
        available_bytes=available_memory_bytes(facts.device),
        weight_bytes=facts.weight_bytes,
        block_bytes=block_bytes(facts.layer_shapes, block_size, facts.dtype),
        layers=len(facts.layer_shapes),
        block_size=block_size,
        max_model_len=limit,
    )
    kv = PagedKV(facts.layer_shapes, num_blocks, block_size, facts.dtype, facts.device)
    return ModelRunner(model, kv, limit)
