"""Whose time a step was: splits its duration among the sequences that were in it.

A sequence's share of a step is its share of the step's tokens. A slice that computes the KV of one output token is
decode, everything else is prefill: the prompt, and what is computed again after a preemption or on another worker. Time
is in whole nanoseconds, so that shares add up to the step to the last one. Knows no clock and no money.
"""

from collections.abc import Sequence as Items

from services.worker.engine.batcher import Slice


def charge(slices: Items[Slice], step_ns: int) -> tuple[int, int]:
    """Adds to each sequence its share of a step that took `step_ns`; the prefill and the decode shares, summed.

    The running sum of the shares is rounded and not each of them, so that nothing is lost. About 0.3 microseconds per
    slice. Slices have at least one token.
    """
    tokens = sum([piece.length for piece in slices])
    done = spent = decode_ns = 0
    for piece in slices:
        sequence = piece.sequence
        done += piece.length
        until = step_ns * done // tokens
        if piece.is_decode:
            sequence.decode_ns += until - spent
            decode_ns += until - spent
        else:
            sequence.prefill_ns += until - spent
        spent = until
    return spent - decode_ns, decode_ns
