"""When a sequence came to this worker, and what it did since."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class RunTimes:
    """Instants of one sequence on this worker, in seconds of the monotonic clock; 0.0: not reached."""

    arrived: float
    # All that was to be brought from elsewhere was here: at once, if that was nothing.
    gathered: float = field(init=False)
    # It got its first place in the batch.
    admitted: float = 0.0
    # Its first and its newest token were handed out.
    begun: float = 0.0
    newest: float = 0.0
    ended: float = 0.0

    def __post_init__(self) -> None:
        self.gathered = self.arrived

    @property
    def fetch_s(self) -> float:
        return self.gathered - self.arrived

    @property
    def queue_s(self) -> float:
        """From then on until it had a place in the batch."""
        return max(0.0, self.admitted - self.gathered)

    @property
    def prefill_s(self) -> float:
        return self.begun - max(self.admitted, self.gathered)

    @property
    def decode_s(self) -> float:
        return self.ended - self.begun
