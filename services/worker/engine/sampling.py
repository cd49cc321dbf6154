"""Draws each sequence's next token from its row of logits. Knows nothing of models, batches or KV.

A row's token depends on the row and its sequence alone, never on what else is in the batch: every operation works
row by row, and each draw is one uniform number keyed by (seed, choice, absolute position).

The order is that of transformers' `generate`: bias, penalties and min_tokens, temperature, top-k, top-p, min-p, each on
what the one before left. (vLLM applies min-p before top-k and top-p, which differs only when both cut.) Of equally
likely tokens the one with the lower id counts as the likelier, as in argmax.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from services.worker.engine.philox import uniform
from services.worker.engine.sequence import Sequence

# Top-k and top-p look at this many of the likeliest tokens, one width after the other, before they sort all of them.
_WINDOWS = (64, 1024)
# Tokens that are summed up in one go before their own weights are looked at; any number gives the same draw.
_RUN = 128
# Smaller ones, which would overflow, are as good as greedy.
_MIN_TEMPERATURE = 1e-5


def sample(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """The next token of each sequence. `logits`: [len(sequences), vocabulary], float32, left as they are."""
    logits = _adjust(logits, sequences)
    greedy: list[int] = []
    whole: list[int] = []
    truncated: list[int] = []
    for row, sequence in enumerate(sequences):
        params = sequence.sampling
        kind = greedy if params.greedy else truncated if params.top_k > 0 or params.top_p < 1.0 else whole
        kind.append(row)
    tokens = [0] * len(sequences)
    for rows, choose in ((greedy, _choose_likeliest), (whole, _draw_from_all), (truncated, _draw_from_likeliest)):
        if rows:
            part = logits if len(rows) == len(sequences) else logits[rows]
            for row, token in zip(rows, choose(part, [sequences[row] for row in rows]), strict=True):
                tokens[row] = token
    return tokens


def _adjust(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Applies bias, penalties and min_tokens to the rows that ask for them, in a copy."""
    adjusted = [
        (row, sequence)
        for row, sequence in enumerate(sequences)
        if sequence.sampling.adjusts or sequence.output_length < sequence.stop.min_tokens
    ]
    if not adjusted:
        return logits
    logits = logits.clone()
    for row, sequence in adjusted:
        if sequence.sampling.logit_bias:
            _bias(logits[row], sequence)
        if sequence.sampling.penalized:
            _penalize(logits[row], sequence)
        if sequence.output_length < sequence.stop.min_tokens:
            stop_ids = [token for token in sequence.stop.stop_token_ids if token < logits.shape[-1]]
            logits[row, stop_ids] = -torch.inf
    return logits


def _bias(row: Tensor, sequence: Sequence) -> None:
    """Adds, in place, what the request adds to single tokens."""
    tokens, biases = zip(*sequence.sampling.logit_bias, strict=True)
    row[list(tokens)] += torch.tensor(biases, dtype=row.dtype, device=row.device)


def _penalize(row: Tensor, sequence: Sequence) -> None:
    """Lowers, in place, the logits of tokens that occurred.

    Repetition (Keskar et al., "CTRL", 2019) counts the prompt too; frequency and presence, as OpenAI's API defines
    them, only the output.
    """
    sampling = sequence.sampling
    tokens = torch.tensor(list(sequence.occurrences), device=row.device)
    times = torch.tensor(list(sequence.occurrences.values()), dtype=row.dtype, device=row.device)
    scores = row[tokens]
    scores = torch.where(scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty)
    row[tokens] = scores - sampling.frequency_penalty * times - sampling.presence_penalty * (times > 0)


def _choose_likeliest(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    if logits.device.type == "cpu":  # numpy's takes a fifth of the time of torch's, row by row
        return [int(row.argmax()) for row in logits.numpy()]
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    return tokens


def _draw_from_all(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    weights = _apply_min_p(_weights(logits, sequences), sequences)
    tokens: list[int] = _invert(weights, sequences).squeeze(1).tolist()
    return tokens


def _draw_from_likeliest(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """Draws within top-k and top-p, for rows that have either."""
    vocabulary = logits.shape[-1]
    weights = _weights(logits, sequences)
    totals = _run_sums(weights)[1][:, -1:]
    tokens = [0] * len(sequences)
    pending = list(range(len(sequences)))
    for width in (*(window for window in _WINDOWS if window < vocabulary), vocabulary):
        some = [sequences[row] for row in pending]
        drawn, settled = _draw_within(width, weights[pending], totals[pending], some)
        for row, token in zip(pending, drawn, strict=True):
            tokens[row] = token
        pending = [row for row, done in zip(pending, settled, strict=True) if not done]
        if not pending:
            break
    return tokens


def _draw_within(
    width: int, weights: Tensor, totals: Tensor, sequences: list[Sequence]
) -> tuple[list[int], list[bool]]:
    """Draws within top-k and top-p by looking only at the `width` likeliest tokens of each row.

    A row is settled when that was enough: its last kept token is among them, and is not one of several equals of which
    some are dropped, since only a stable sort of all tokens puts equals in order of id.
    """
    vocabulary = weights.shape[-1]
    if width < vocabulary:
        ordered, ids = weights.topk(width, dim=-1)
    else:
        ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    limits = _column([each.sampling.top_k if each.sampling.top_k > 0 else vocabulary for each in sequences], ids)
    keep = _keep(ordered, limits, totals, _column([each.sampling.top_p for each in sequences], totals))
    count = keep.sum(dim=-1, keepdim=True)
    first_dropped = ordered.gather(1, count.clamp(max=width - 1))
    settled = (count < width) & (first_dropped < ordered.gather(1, count - 1))
    settled &= (limits <= width) | (limits >= vocabulary)  # else the mass of the top k is not known
    kept = _apply_min_p(ordered.masked_fill(~keep, 0.0), sequences)
    ids, order = ids.sort(dim=-1)
    drawn = ids.gather(1, _invert(kept.gather(1, order), sequences))
    everything = [True] * len(sequences)
    return drawn.squeeze(1).tolist(), settled.squeeze(1).tolist() if width < vocabulary else everything


def _keep(ordered: Tensor, limits: Tensor, totals: Tensor, top_p: Tensor) -> Tensor:
    """Which of a row's leading weights, in descending order, pass top-k (`limits`) and top-p (Holtzman et al., 2019).

    The nucleus is the smallest set that has at least `top_p` of what top-k left. ordered: [rows, width]; `limits`,
    `totals` (of the whole row) and `top_p`: [rows, 1].
    """
    width = ordered.shape[-1]
    within_k = ordered.masked_fill(torch.arange(width, device=ordered.device) >= limits, 0.0)
    cumulative = within_k.cumsum(dim=-1, dtype=torch.float64)
    before = pad(cumulative, (1, -1))
    keep = (within_k > 0) & (before < top_p * torch.where(limits <= width, cumulative[:, -1:], totals))
    keep[:, 0] = True
    return keep


def _weights(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Likelihoods at each sequence's temperature, relative to its likeliest token, which has 1."""
    temperatures = _column([each.sampling.temperature for each in sequences], logits).clamp(min=_MIN_TEMPERATURE)
    # The maximum goes first, so that dividing by a small temperature cannot overflow. In place, since fresh memory
    # for a whole vocabulary costs more than the arithmetic.
    return logits.sub(logits.amax(dim=-1, keepdim=True)).div_(temperatures).exp_()


def _apply_min_p(weights: Tensor, sequences: list[Sequence]) -> Tensor:
    """Drops, in place, tokens less than `min_p` times as likely as the likeliest (Nguyen et al., 2024)."""
    if any(each.sampling.min_p > 0 for each in sequences):
        weights.masked_fill_(weights < _column([each.sampling.min_p for each in sequences], weights), 0.0)
    return weights


def _invert(weights: Tensor, sequences: list[Sequence]) -> Tensor:
    """Indices [rows, 1] at which the rows' cumulative weights pass the sequences' uniform numbers.

    The weights stand in order of token id, also after top-k and top-p: a small numeric difference in the logits then
    moves the boundaries between tokens a little, but never swaps two tokens.
    """
    runs, cumulative = _run_sums(weights)
    uniforms = [uniform(each.sampling.seed, each.choice, len(each.tokens)) for each in sequences]
    targets = _column(uniforms, cumulative) * cumulative[:, -1:]
    # "Right" passes over weights of 0. The clamps hold for rows of NaN, which must not end the step of all others.
    run = torch.searchsorted(cumulative, targets, right=True).clamp(max=cumulative.shape[-1] - 1)
    within = runs[torch.arange(len(runs), device=runs.device), run.squeeze(1)].cumsum(dim=-1, dtype=torch.float64)
    rest = targets - pad(cumulative, (1, -1)).gather(1, run)
    rest = rest.minimum(within[:, -1:] * (1 - 2**-53))  # the run was summed in another order
    index = run * _RUN + torch.searchsorted(within, rest, right=True)
    return index.clamp(max=weights.shape[-1] - 1)


def _run_sums(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The rows cut into runs, [rows, runs, _RUN], and the cumulative sums of whole runs, [rows, runs], float64."""
    lacking = -weights.shape[-1] % _RUN
    runs = (pad(weights, (0, lacking)) if lacking else weights).reshape(len(weights), -1, _RUN)
    return runs, runs.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)


def _column(values: list[float] | list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
