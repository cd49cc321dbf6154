"""What the engine has done since it started, for metrics and tests."""

from dataclasses import dataclass


@dataclass(slots=True)
class EngineCounters:
    """Totals that only grow. Tokens computed again after a preemption count again."""

    steps: int = 0
    prefill_tokens: int = 0
    prefill_chunks: int = 0
    decode_tokens: int = 0
    draft_tokens: int = 0  # computed in advance: see speculative.py
    accepted_tokens: int = 0  # of these, tokens that were right
    preemptions: int = 0
    prefix_queried_tokens: int = 0  # prompt tokens looked up in the block pool, at first admission
    prefix_hit_tokens: int = 0  # of these, tokens whose KV was there
    prefill_ns: int = 0  # time in steps, by what it was spent on: see step_shares.py
    decode_ns: int = 0
    failed_ns: int = 0  # in steps that failed, which are nobody's
