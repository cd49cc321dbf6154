"""No model: every sequence's output is its prompt, over and over. For those who write clients, and to measure all that
is not the model. Tokens come from rows of logits that leave no doubt, whatever the sampling, so batching, blocks and
sampling are the real ones.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from services.worker.engine.batcher import Batch
from services.worker.engine.kernels.paged_kv import LayerShape, PagedKV
from services.worker.engine.model.interface import ModelError, ModelFacts
from services.worker.engine.sequence import Sequence

_CERTAIN = 1e4  # the logit of the token that comes; all others have 0


class EchoModel:
    """Takes as long for each step as it is told, and computes nothing."""

    def __init__(
        self,
        vocabulary_size: int,
        max_context_tokens: int,
        *,
        step_s: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.facts = ModelFacts(
            implementation="echo",
            vocabulary_size=vocabulary_size,
            max_context_tokens=max_context_tokens,
            layer_shapes=(LayerShape(1, 1, 1),),
            weight_bytes=0,
            dtype=torch.float32,
            device=torch.device("cpu"),
            numerics="echo",
        )
        self._step_s = step_s
        self._sleep = sleep
        self._rows = torch.zeros(0, vocabulary_size)
        self._told = torch.empty(0, dtype=torch.long)  # the tokens of `_rows`, as the step before left them

    def forward(self, batch: Batch, kv: PagedKV) -> Tensor:
        """Leaves the KV as it is; logits of what comes next in each prompt."""
        if self._step_s:
            self._sleep(self._step_s)
        tokens = torch.tensor([_next(piece.sequence) for piece in batch.slices if piece.samples], dtype=torch.long)
        self._rows[torch.arange(len(self._told)), self._told] = 0.0
        if len(tokens) > len(self._rows):
            self._rows = torch.zeros(len(tokens), self.facts.vocabulary_size)
        self._rows[torch.arange(len(tokens)), tokens] = _CERTAIN
        self._told = tokens
        return self._rows[: len(tokens)]


def echo_model(config: Mapping[str, Any], step_s: float) -> EchoModel:
    """An echo with the vocabulary and the context of a model's config.json."""
    text_config = config.get("text_config", config)
    try:
        return EchoModel(int(text_config["vocab_size"]), int(text_config["max_position_embeddings"]), step_s=step_s)
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]}.") from None


def _next(sequence: Sequence) -> int:
    return sequence.tokens[sequence.output_length % sequence.prompt_length]
