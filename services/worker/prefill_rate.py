"""How fast this worker computes prompts, by its own steps: what bounds the time worth spending on KV from elsewhere."""

from services.worker.engine_loop import Turn

_FIRST_GUESS = 500.0  # tokens per second: a small model on a small CPU
_LEAST_TOKENS = 64  # of a step that tells anything of prefill
_WEIGHT = 0.3  # of the newest step in the moving average


class PrefillRate:
    """A moving average."""

    def __init__(self) -> None:
        self.tokens_per_s = _FIRST_GUESS
        self._measured = False

    def observe(self, turn: Turn) -> None:
        """Called after each turn of the engine."""
        if turn.result is None or turn.result.computed_tokens < _LEAST_TOKENS or turn.step_seconds <= 0:
            return
        rate = turn.result.computed_tokens / turn.step_seconds
        self.tokens_per_s = rate if not self._measured else self.tokens_per_s + _WEIGHT * (rate - self.tokens_per_s)
        self._measured = True
