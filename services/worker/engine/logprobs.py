"""Log-probabilities of drawn tokens and of the likeliest ones beside them, for sequences that ask for them.

They are the model's own: log-softmax of its logits as they come, before bias, penalties, temperature and filters
(vLLM's `raw_logprobs`). Each row is computed alone, so its numbers do not depend on what else is in the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.engine.sequence import Sequence


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
    logprobs = row.log_softmax(dim=-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    chosen = float(logprobs[token])
    if count == 0:
        return TokenLogprobs(chosen, [], [])
    least = logprobs.topk(min(count, len(logprobs))).values[-1]
    ids = (logprobs >= least).nonzero().squeeze(1)  # in order of id, and so are equals after a stable sort
    top, order = logprobs[ids].sort(descending=True, stable=True)
    return TokenLogprobs(chosen, ids[order[:count]].tolist(), top[:count].tolist())
