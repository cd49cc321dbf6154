"""What this worker can still take on, and how that is shared out among schedulers.

Pure arithmetic over the engine's last status and the sequences sent to it since. Knows no streams.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from services.worker.engine_loop import EngineStatus


@dataclass(frozen=True, slots=True)
class Room:
    """An amount of what a request takes: free, granted or asked for."""

    sequences: int
    blocks: int
    prefill_tokens: int

    def share(self, shares: int, turn: int) -> list["Room"]:
        """Splits it evenly; what does not divide goes to other shares as `turn` goes up, so that none is left out."""
        sequences = _split(self.sequences, shares, turn)
        blocks = _split(self.blocks, shares, turn)
        prefill_tokens = _split(self.prefill_tokens, shares, turn)
        return [Room(*parts) for parts in zip(sequences, blocks, prefill_tokens, strict=True)]


@dataclass(slots=True, eq=False)
class Claim:
    """What a request takes that no status of the engine reflects yet."""

    demand: Room
    command: int | None  # the number of the command that sent it to the engine; None: it is not there yet


class Capacity:
    """Admission to the engine: counts what was taken on, whether or not the engine has seen it yet."""

    def __init__(
        self,
        *,
        max_sequences: int,
        max_pending_prefill_tokens: int,
        free_blocks: Callable[[], int],
    ) -> None:
        """`free_blocks` gives those of the block pool at this moment."""
        self.max_sequences = max_sequences
        self.max_pending_prefill_tokens = max_pending_prefill_tokens
        self.idle = asyncio.Event()
        """Set while nothing is live."""
        self.idle.set()
        self._live = 0
        self._alone = False  # what is live is to stay alone
        self._free_blocks = free_blocks
        self._waiting_blocks = 0
        self._pending_prefill_tokens = 0
        self._unseen: dict[Claim, None] = {}  # an insertion-ordered set

    @property
    def live_sequences(self) -> int:
        """Sequences taken on and not ended."""
        return self._live

    @property
    def free(self) -> Room:
        """What is free now. A block is kept back for each live sequence, which soon needs another."""
        if self._alone:
            return Room(0, 0, 0)
        unseen_blocks = sum(claim.demand.blocks for claim in self._unseen)
        return Room(
            sequences=self.max_sequences - self._live,
            blocks=max(0, self._free_blocks() - self._waiting_blocks - unseen_blocks - self._live),
            prefill_tokens=max(0, self.max_pending_prefill_tokens - self.pending_prefill_tokens),
        )

    @property
    def pending_prefill_tokens(self) -> int:
        """Prompt tokens taken on and still to be computed."""
        return self._pending_prefill_tokens + sum(claim.demand.prefill_tokens for claim in self._unseen)

    def admits(self, demand: Room, *, alone: bool = False) -> bool:
        """Whether a request can be taken on. An idle worker takes any that it can run at all; `alone`: no other does.

        While prompt tokens may be taken on at all, a prompt of any length is: how much of it the block pool has, which
        the scheduler counted on, is known only when it is admitted to the batch.
        """
        if not self._live:
            return demand.sequences <= self.max_sequences
        free = self.free
        return (
            not alone
            and demand.sequences <= free.sequences
            and demand.blocks <= free.blocks
            and free.prefill_tokens > 0
        )

    def take(self, demand: Room, *, alone: bool = False) -> Claim:
        """Counts a request that was taken on and is not yet in the engine: see `sent` and `withdraw`.

        `alone`: nothing else is admitted until it has ended.
        """
        self._live += demand.sequences
        self._alone = alone
        self.idle.clear()
        claim = Claim(demand, None)
        self._unseen[claim] = None
        return claim

    def sent(self, claim: Claim, command: int) -> None:
        """Its sequences were sent to the engine with this command, whose status counts them from then on."""
        claim.command = command

    def withdraw(self, claim: Claim) -> None:
        """Its sequences will never reach the engine. They still count as live until each is released."""
        self._unseen.pop(claim, None)

    def release(self) -> None:
        """A sequence has ended. Its blocks count as free once the engine says so."""
        self._live -= 1
        assert self._live >= 0, "more sequences ended than were taken on"
        if not self._live:
            self._alone = False
            self.idle.set()

    def observe(self, status: EngineStatus) -> None:
        """Takes over what the engine says."""
        for claim in [
            claim for claim in self._unseen if claim.command is not None and claim.command <= status.commands
        ]:
            del self._unseen[claim]
        self._waiting_blocks = status.waiting_blocks
        self._pending_prefill_tokens = status.pending_prefill_tokens


def _split(amount: int, shares: int, turn: int) -> list[int]:
    base, rest = divmod(amount, shares)
    return [base + ((index - turn) % shares < rest) for index in range(shares)]
