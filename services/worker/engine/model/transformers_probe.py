"""Finds out whether a transformers model can run over paged KV, and with which KV per layer.

Two looks. `examine` runs the model once on a few tokens with an attention that computes nothing but records what it is
called with: heads and sizes per layer, and anything that paged attention does not have. `verify` then compares the
logits over paged KV with the model's own, two sequences side by side and one of them in two chunks: a model that keeps
state besides KV, or looks at its neighbors in the batch, fails here and not in a user's answer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.kernels.paged_kv import LayerKV, LayerShape, PagedKV
from services.worker.engine.kernels.step_inputs import StepInputs, build_step_inputs
from services.worker.engine.model.interface import ModelError, ModelFacts
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams

PROBE = "headrace_probe"
BLOCK_SIZE = 4  # small, so that a few tokens span several blocks
# Relative error of the logits that rounding explains; a wrong mask or lost state is off by far more.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}

# Arguments that change the attention's result and that paged attention has no means for.
UNSUPPORTED_ARGUMENTS = {"s_aux": "attention sinks", "position_bias": "a position bias", "head_mask": "a head mask"}


@dataclass(slots=True)
class _Record:
    shapes: dict[int, LayerShape] = field(default_factory=dict)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any
    ) -> tuple[Tensor, None]:
        """Stands in for the attention function of transformers: query [1, heads, T, dim] -> [1, T, heads, dim]."""
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or index in self.shapes:
            raise ModelError(f"its {type(module).__name__} does not name its layer")
        for name, meaning in UNSUPPORTED_ARGUMENTS.items():
            if arguments.get(name) is not None:
                raise ModelError(f"its attention uses {meaning}")
        self.shapes[index] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
        if arguments.get("sliding_window") != (None if mask is None else mask.item()):
            raise ModelError("its attention is not told of the sliding window that its mask has")
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

    def mask(self, *, use_vmap: bool = False, local_size: int | None = None, **_: Any) -> Tensor | None:
        """Stands in for the mask function of transformers: the "mask" is just the window, for `attend` to compare."""
        if use_vmap:
            raise ModelError("it lays a mask of its own over the causal one")
        return None if local_size is None else torch.full((1, 1, 1, 1), local_size)


def examine(model: Any) -> tuple[LayerShape, ...]:
    """KV of each layer of `model`, a PreTrainedModel. Raises ModelError with the reason when it cannot be paged."""
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ModelError("it is an encoder-decoder model")
    if not model._supports_attention_backend or not model._can_set_attn_implementation():
        raise ModelError("its code in transformers does not use the attention interface")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ModelError(f"it has layers of type {', '.join(sorted(kinds))}")
    record = _Record()
    AttentionInterface.register(PROBE, record.attend)
    AttentionMaskInterface.register(PROBE, record.mask)
    model.set_attn_implementation(PROBE)
    tokens = torch.arange(4, device=model.device)[None]
    model(input_ids=tokens, position_ids=tokens, use_cache=False)
    if sorted(record.shapes) != list(range(config.num_hidden_layers)):
        raise ModelError(f"only {len(record.shapes)} of its {config.num_hidden_layers} layers are attention layers")
    return tuple(shape for _, shape in sorted(record.shapes.items()))


Forward = Callable[[StepInputs, tuple[LayerKV, ...]], Tensor]


def verify(facts: ModelFacts, forward: Forward, own: Callable[[Tensor], Tensor]) -> None:
    """Compares `forward` over paged KV with `own`, which maps ids [1, T] to logits [1, T, vocabulary].

    Raises ModelError with the reason when they disagree.
    """
    kv = PagedKV(facts.layer_shapes, num_blocks=16, block_size=BLOCK_SIZE, dtype=facts.dtype, device=facts.device)
    first = _sequence([(11 + 7 * i) % facts.vocabulary_size for i in range(21)], blocks=[9, 2, 14, 1, 0, 5])
    second = _sequence([(13 + 5 * i) % facts.vocabulary_size for i in range(14)], blocks=[3, 8, 4, 10])
    steps = (
        (Slice(first, 0, 12), Slice(second, 0, 13)),
        (Slice(second, 13, 1), Slice(first, 12, 9)),
    )
    for slices in steps:
        logits = forward(build_step_inputs(Batch(slices), BLOCK_SIZE, facts.device), kv.layers)
    for sequence, ours in zip((second, first), logits, strict=True):
        ids = torch.tensor([sequence.tokens], device=facts.device)
        expected = own(ids)[0, -1].float()
        error = (ours - expected).norm() / (expected - expected.mean()).norm()
        if not error < TOLERANCE[facts.dtype]:
            raise ModelError(f"its logits over paged KV differ from its own by {error:.1%}")


def _sequence(tokens: list[int], blocks: list[int]) -> Sequence:
    sequence = Sequence("probe", tokens, len(tokens), SamplingParams(), StopParams(max_tokens=1))
    sequence.blocks = blocks
    return sequence
