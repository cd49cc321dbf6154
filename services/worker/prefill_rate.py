"""How fast this worker computes prompts, by its own steps: what bounds the time worth spending on KV from elsewhere."""

from services.worker.engine_loop import Turn

_FIRST_GUESS = 500.0  # tokens per second: a small model on a small CPU
_LEAST_TOKENS = 64  # of a step that tells anything of prefill
_WEIGHT = 0.3  # of the newest step in the moving average


class PrefillRate:
    """A moving average."""

    def __init__(self) -> None:
        self.measured = 0.0
        """Tokens per second; 0 until a step has told."""

    @property
    def tokens_per_s(self) -> float:
        """What is measured, and a guess before that."""
        return self.measured or _FIRST_GUESS

    def observe(self, turn: Turn) -> None:
        """Called after each turn of the engine."""
        if turn.result is None or turn.result.computed_tokens < _LEAST_TOKENS or turn.step_seconds <= 0:
            return
        rate = turn.result.computed_tokens / turn.step_seconds
        self.measured += (rate - self.measured) * (_WEIGHT if self.measured else 1)
