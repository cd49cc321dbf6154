"""Log-probabilities of drawn tokens and of the likeliest ones beside them, for sequences that ask for them.

They are the model's own: log-softmax of its logits as they come, before bias, penalties, temperature and filters
(vLLM's `raw_logprobs`). Each row is computed alone, so its numbers do not depend on what else is in the batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.engine.sequence import Sequence

# Tokens of which only the likeliest is looked at first; any number gives the same answer.
_RUN = 128


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one drawn token, and of the likeliest tokens in its place, the likeliest first."""

    token: float
    top_ids: list[int]
    top: list[float]


def token_logprobs(
    logits: Tensor, sequences: list[Sequence], tokens: list[int]
) -> list[tuple[Sequence, TokenLogprobs]]:
    """Those of the sequences that ask. `logits`: [len(sequences), vocabulary], float32, those that were drawn from."""
    return [
        (sequence, _of_row(logits[row], token, count))
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
        if (count := sequence.sampling.logprobs) is not None
    ]


def _of_row(row: Tensor, token: int, count: int) -> TokenLogprobs:
    logprobs = row.log_softmax(dim=-1)
    if math.isnan(chosen := float(logprobs[token])):  # one NaN, or infinity alone, makes all of them NaN
        logprobs, chosen = torch.full_like(logprobs, -torch.inf), -math.inf
    if count == 0:
        return TokenLogprobs(chosen, [], [])
    ids = (logprobs >= _bound(logprobs, count)).nonzero().squeeze(1)
    top, order = logprobs[ids].sort(descending=True, stable=True)  # equals stay in order of id
    return TokenLogprobs(chosen, ids[order[:count]].tolist(), top[:count].tolist())


def _bound(logprobs: Tensor, count: int) -> Tensor:
    """At least `count` of them, or all, are no smaller than this, and few more: it is the `count`-th of the largest of
    each run of tokens, which is found in a fraction of the time of the `count`-th of all.
    """
    runs = len(logprobs) // _RUN
    if runs < count:
        return logprobs.min()
    return logprobs[: runs * _RUN].view(runs, _RUN).amax(dim=-1).topk(count).values[-1]
