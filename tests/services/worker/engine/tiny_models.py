"""Tiny random models in Hugging Face form, and the paged computation that tests compare with their own."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.kernels.paged_kv import PagedKV
from services.worker.engine.model.interface import CausalModel
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams

BLOCK_SIZE = 4
VOCABULARY = 99


def save_tiny(folder: Path, config_class: str, **settings: Any) -> Any:
    """Writes a random float32 model whose every weight matters (biases and norms too); returns it in eval mode."""
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(vocab_size=VOCABULARY, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.randn_like(parameter)
            parameter.copy_(spread * 0.25 if parameter.ndim > 1 else parameter + 0.2 * spread)
    model.save_pretrained(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer whose words are w0, w1, ... for the ids 0, 1, ..."""
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def make_sequence(tokens: list[int], blocks: list[int], *, prompt_length: int | None = None) -> Sequence:
    """A sequence that has its blocks already."""
    sequence = Sequence("key", tokens, prompt_length or len(tokens), SamplingParams(), StopParams(max_tokens=1000))
    sequence.blocks = blocks
    return sequence


def paged_logits(model: CausalModel, prompts: list[list[int]]) -> list[Tensor]:
    """Last-token logits of each prompt: all in one batch, each in chunks of 1/3, 2/3 - 1 and 1, in scattered blocks."""
    facts = model.facts
    kv = PagedKV(facts.layer_shapes, 64, BLOCK_SIZE, facts.dtype, facts.device)
    free = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    sequences = []
    for prompt in prompts:
        blocks = [free.pop() for _ in range(-(-len(prompt) // BLOCK_SIZE))]
        sequences.append(make_sequence(list(prompt), blocks))
    with torch.inference_mode():
        for first, last in ((0, 1 / 3), (1 / 3, None)):
            slices = []
            for sequence in sequences:
                start = int(len(sequence.tokens) * first)
                end = len(sequence.tokens) - 1 if last is None else int(len(sequence.tokens) * last)
                slices.append(Slice(sequence, start, end - start))
            model.forward(Batch(tuple(slices)), kv)
        decodes = tuple(Slice(sequence, len(sequence.tokens) - 1, 1) for sequence in sequences)
        return list(model.forward(Batch(decodes), kv).clone())


def own_logits(model: Any, prompt: list[int]) -> Tensor:
    """Last-token logits of transformers' own forward."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([prompt])).logits[0, -1]
    return logits


def prompts() -> list[list[int]]:
    """Of lengths that end inside, at and after block boundaries."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in (6, 16, 21, 45)]
