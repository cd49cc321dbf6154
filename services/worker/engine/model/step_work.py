"""The least that a step of a Llama-shaped model has to do, whatever computes it: what it reads and multiplies."""

from dataclasses import dataclass

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.model.llama_config import LlamaConfig


@dataclass(frozen=True, slots=True)
class StepWork:
    read_bytes: int  # of weights and KV, each once
    weight_products: int  # multiply-adds with weights, the head's only for rows that sample
    attention_products: int  # multiply-adds of queries with keys and of their weights with values


def step_work(config: LlamaConfig, batch: Batch, *, weight_bytes: int, kv_element_bytes: int) -> StepWork:
    """`weight_bytes`: of all matrices that a step multiplies with."""
    rows = sum(part.length for part in batch.slices)
    sampled = sum(part.sampled_rows for part in batch.slices)
    in_layers = config.layers * sum(columns * depth for columns, depth in config.layer_matrices)
    keys_read, pairs = 0, 0
    for part in batch.slices:
        for window in config.windows:
            keys_read += min(part.start + part.length, part.length - 1 + (window or config.max_context_tokens))
            pairs += _query_key_pairs(part, window)
    return StepWork(
        read_bytes=weight_bytes + keys_read * 2 * config.kv_heads * config.head_dim * kv_element_bytes,
        weight_products=rows * in_layers + sampled * config.vocabulary_size * config.hidden_size,
        attention_products=pairs * 2 * config.heads * config.head_dim,
    )


def _query_key_pairs(part: Slice, window: int | None) -> int:
    """Over all tokens of the slice, how many keys each sees."""
    positions = range(part.start, part.start + part.length)
    return sum(position + 1 if window is None else min(position + 1, window) for position in positions)
