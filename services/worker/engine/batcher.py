"""Decides which tokens of which sequences the next step computes."""

from dataclasses import dataclass

from services.worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens [start, start + length) of one sequence, computed in this step.

    All blocks for positions below start + length are allocated. `samples` when the slice reaches the sequence's last
    token, so that its logits give the next one.
    """

    sequence: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        return self.start + self.length == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """The slices of one step: at most one per sequence, decodes (length 1) first."""

    slices: tuple[Slice, ...]
