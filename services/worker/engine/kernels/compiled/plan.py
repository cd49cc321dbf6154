"""One step's batch as the numbers that the compiled step reads. Knows nothing of models."""

from dataclasses import dataclass

from services.worker.engine.batcher import Batch


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """All slices of a step, flattened to T rows in slice order."""

    tokens: list[int]  # [T]
    positions: list[int]  # [T]
    row_blocks: list[int]  # [T]: the block that each row's key and value go to
    first_rows: list[int]  # [slices + 1]; the last is T
    table_starts: list[int]  # [slices]: where each one's block table begins in `tables`
    tables: list[int]
    sampled_rows: list[int]  # [rows that sample]
    longest_context: int  # tokens


def plan_step(batch: Batch, block_size: int) -> StepPlan:
    """Flattens `batch`. Each slice's sequence must hold the blocks of all its positions up to the slice's end."""
    tokens: list[int] = []
    positions: list[int] = []
    row_blocks: list[int] = []
    first_rows, table_starts = [0], []
    tables: list[int] = []
    sampled_rows: list[int] = []
    longest = 0
    for part in batch.slices:
        start, end, blocks = part.start, part.start + part.length, part.sequence.blocks
        if part.length == 1:
            tokens.append(part.sequence.tokens[start])
            positions.append(start)
            row_blocks.append(blocks[start // block_size])
        else:
            tokens += part.tokens
            positions += range(start, end)
            row_blocks += [blocks[position // block_size] for position in range(start, end)]
        first_rows.append(len(tokens))
        table_starts.append(len(tables))
        tables += blocks[: (end - 1) // block_size + 1]
        sampled_rows += range(len(tokens) - part.sampled_rows, len(tokens))
        longest = max(longest, end)
    return StepPlan(tokens, positions, row_blocks, first_rows, table_starts, tables, sampled_rows, longest)
