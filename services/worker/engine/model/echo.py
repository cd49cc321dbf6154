"""No model: a chat is answered with its last message, a prompt with itself, over and over if nothing ends it. For those
who write clients, and to measure all that is not the model. Tokens come from rows of logits that leave no doubt,
whatever the sampling, so batching, blocks and sampling are the real ones.
"""

import json
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Tokens
from itertools import pairwise
from pathlib import Path
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
        special_ids: frozenset[int] = frozenset(),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`special_ids`: tokens that chat templates put around what is said."""
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
        self._special_ids = special_ids
        self._said: dict[Sequence, Tokens[int]] = {}  # of the sequences of the step before, what each repeats
        self._rows = torch.zeros(0, vocabulary_size)
        self._told = torch.empty(0, dtype=torch.long)  # the tokens of `_rows`, as the step before left them

    def forward(self, batch: Batch, kv: PagedKV) -> Tensor:
        """Leaves the KV as it is; logits of what comes next in each prompt."""
        if self._step_s:
            self._sleep(self._step_s)
        self._said = {one: self._said.get(one) or self._repeated(one) for one in (s.sequence for s in batch.slices)}
        following = [self._next(piece.sequence) for piece in batch.slices if piece.samples]
        tokens = torch.tensor(following, dtype=torch.long)
        self._rows[torch.arange(len(self._told)), self._told] = 0.0
        if len(tokens) > len(self._rows):
            self._rows = torch.zeros(len(tokens), self.facts.vocabulary_size)
        self._rows[torch.arange(len(tokens)), tokens] = _CERTAIN
        self._told = tokens
        return self._rows[: len(tokens)]

    def _repeated(self, sequence: Sequence) -> Tokens[int]:
        return repeated(sequence.tokens[: sequence.prompt_length], self._special_ids)

    def _next(self, sequence: Sequence) -> int:
        said = self._said[sequence]
        return said[sequence.output_length % len(said)]


def repeated(prompt: Tokens[int], special_ids: frozenset[int]) -> Tokens[int]:
    """Of a chat the last message that says something, with the special token that ends it; else the prompt.

    What a template writes after a special token and before what is said, such as the role, ends with the same token as
    what it writes before the answer.
    """
    marks = [position for position, token in enumerate(prompt) if token in special_ids]
    header = prompt[marks[-1] + 1 :] if marks else prompt
    for begin, end in reversed(list(pairwise(marks))):
        between = list(prompt[begin + 1 : end + 1])
        if header and header[-1] not in between:
            continue
        said = between[between.index(header[-1]) + 1 :] if header else between
        if len(said) > 1:  # more than its end
            return said
    return prompt


def echo_model(config: Mapping[str, Any], step_s: float, folder: Path) -> EchoModel:
    """An echo with the vocabulary and the context of a model's config.json, and the special tokens of its folder."""
    text_config = config.get("text_config", config)
    try:
        vocabulary_size, context = int(text_config["vocab_size"]), int(text_config["max_position_embeddings"])
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]}.") from None
    return EchoModel(vocabulary_size, context, step_s=step_s, special_ids=_special_ids(folder / "tokenizer.json"))


def _special_ids(tokenizer: Path) -> frozenset[int]:
    """None if there is no such file: tokenizers come in other shapes, too."""
    if not tokenizer.is_file():
        return frozenset()
    added = json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens", ())
    return frozenset(token["id"] for token in added if token.get("special"))
