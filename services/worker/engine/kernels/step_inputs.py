"""One step's batch as tensors: which tokens, at which positions, into which KV slots, attending to what.

Built once per step and read by every layer. Knows nothing of models or of kernels.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.kernels.paged_kv import PagedKV

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionGroup:
    """Slices of one query length that attend together; their rows in the step are [slices * query_length].

    A prefill slice is a group of its own. Decodes share a group when their numbers of blocks round up to the same
    power of two, so that padding the block tables to the longest at most doubles the keys that are read.
    """

    rows: Tensor | slice  # which rows of the step; a slice where they are contiguous
    slices: int
    query_length: int
    context_length: int  # the longest one, cached tokens and this step's together
    tables: Tensor  # int64 [slices, blocks], a shorter one padded with its own last block
    positions: Tensor  # int64 [slices, query_length]
    fresh: bool  # one slice that starts at position 0
    _bias: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 where a query may see a key, -inf elsewhere: [slices, 1, query_length, context_length].

        A query at position p sees the keys 0..p, or the last `window` of them.
        """
        if (window, dtype) not in self._bias:
            keys = torch.arange(self.context_length, device=self.positions.device)
            queries = self.positions[:, None, :, None]
            seen = keys <= queries
            if window is not None:
                seen &= keys > queries - window
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self._bias[window, dtype] = bias.masked_fill_(~seen, float("-inf"))
        return self._bias[window, dtype]

    def sees_everything(self, window: int | None) -> bool:
        """Whether no key of the context is hidden from any query, so that no bias is needed."""
        return self.slices == self.query_length == 1 and (window is None or self.context_length <= window)

    def is_plain_causal(self, window: int | None) -> bool:
        """Whether query i sees exactly the keys 0..i."""
        return self.fresh and (window is None or self.context_length <= window)


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """All slices of a step, flattened to T rows in slice order."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slot_blocks: Tensor  # int64 [T]: the block that each row's KV goes to
    slot_offsets: Tensor  # int64 [T]: its place in that block
    begun_blocks: Tensor  # int64: blocks that the step begins and does not fill, so that an earlier use's KV is in them
    groups: tuple[AttentionGroup, ...]
    sampled_rows: Tensor  # int64 [rows that sample], in slice order


def build_step_inputs(batch: Batch, block_size: int, device: torch.device) -> StepInputs:
    """Flattens `batch`. Each slice's sequence must hold the blocks of all its positions up to the slice's end."""
    tokens: list[int] = []
    positions: list[IntArray] = []
    tables: list[IntArray] = []
    begun_blocks: list[int] = []
    sampled_rows: list[int] = []
    for part in batch.slices:
        end = part.start + part.length
        tokens += part.tokens
        positions.append(np.arange(part.start, end))
        tables.append(np.array(part.sequence.blocks[: -(-end // block_size)], dtype=np.int64))
        if end % block_size and part.start <= end - end % block_size:
            begun_blocks.append(part.sequence.blocks[end // block_size])
        sampled_rows += range(len(tokens) - part.sampled_rows, len(tokens))
    flat_positions = np.concatenate(positions)
    slot_blocks = np.concatenate([table[p // block_size] for table, p in zip(tables, positions, strict=True)])
    return StepInputs(
        tokens=torch.tensor(tokens, device=device),
        positions=_to_device(flat_positions, device),
        slot_blocks=_to_device(slot_blocks, device),
        slot_offsets=_to_device(flat_positions % block_size, device),
        begun_blocks=torch.tensor(begun_blocks, dtype=torch.int64, device=device),
        groups=_groups(batch.slices, tables, device),
        sampled_rows=torch.tensor(sampled_rows, dtype=torch.int64, device=device),
    )


def begin_step(batch: Batch, kv: PagedKV, device: torch.device) -> StepInputs:
    """The step's inputs, and `kv` made ready for it."""
    step = build_step_inputs(batch, kv.block_size, device)
    # Masked slots still enter attention as 0 * value: NaN that an earlier use of the block left would spread.
    kv.storage[step.begun_blocks] = 0
    return step


def _groups(slices: Sequence[Slice], tables: Sequence[IntArray], device: torch.device) -> tuple[AttentionGroup, ...]:
    decodes: dict[int, list[int]] = defaultdict(list)
    groups: list[AttentionGroup] = []
    first_rows = np.cumsum([0, *(part.length for part in slices)])
    for index, part in enumerate(slices):
        if part.length == 1:
            decodes[(len(tables[index]) - 1).bit_length()].append(index)
        else:
            groups.append(_group([part], [tables[index]], first_rows[index : index + 1], device))
    for members in decodes.values():
        group = _group([slices[i] for i in members], [tables[i] for i in members], first_rows[members], device)
        groups.append(group)
    return tuple(groups)


def _group(
    slices: Sequence[Slice], tables: Sequence[IntArray], first_rows: IntArray, device: torch.device
) -> AttentionGroup:
    """Slices of one length; `first_rows` are their first rows in the step."""
    length = slices[0].length
    starts = np.array([part.start for part in slices])
    width = max(map(len, tables))
    # Masked keys and values still enter as 0 * value, so padding with another sequence's block would let its NaN in.
    padded = np.stack([np.pad(table, (0, width - len(table)), mode="edge") for table in tables])
    rows = (first_rows[:, None] + np.arange(length)).ravel()
    contiguous = rows[-1] - rows[0] + 1 == len(rows)
    return AttentionGroup(
        rows=slice(int(rows[0]), int(rows[-1]) + 1) if contiguous else _to_device(rows, device),
        slices=len(slices),
        query_length=length,
        context_length=int(starts.max()) + length,
        tables=_to_device(padded, device),
        positions=_to_device(starts[:, None] + np.arange(length), device),
        fresh=len(slices) == 1 and slices[0].start == 0,
    )


def _to_device(array: IntArray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
