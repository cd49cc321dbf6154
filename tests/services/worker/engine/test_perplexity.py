"""What the compiled path and its fewer bits cost in perplexity, on this project's own words and with the default model.

`perplexity_text.md` is a frozen copy of documentation; it never changes, so that figures stay comparable. Printed with
`pytest -s`.
"""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.model.interface import CausalModel
from services.worker.engine.model.loading import load_model
from services.worker.engine.model_runner import build_model_runner
from tests.services.worker.engine.tiny_models import make_sequence

TEXT = Path(__file__).with_name("perplexity_text.md")
WINDOW = 256  # tokens; each is scored given those before it in its window, but for the window's first
BLOCK_SIZE = 16

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "native float32": {"implementation": "native", "dtype": "float32"},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int4": {"dtype": "bfloat16", "quantize": "int4"},
}

pytestmark = pytest.mark.timeout(600)  # half a minute each is usual; a busy machine takes many times that


@pytest.fixture(scope="module")
def tokens(default_model: Path) -> list[int]:
    tokenizer = Tokenizer.from_file(str(default_model / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids
    assert len(ids) >= 5000
    return ids


@pytest.fixture(scope="module")
def perplexity(default_model: Path, tokens: list[int]) -> Callable[[str], float]:
    """That of a configuration by its name; computed once."""

    @cache
    def compute(name: str) -> float:
        settings = {"implementation": "compiled", "block_size": BLOCK_SIZE, **CONFIGURATIONS[name]}
        found = perplexity_of(load_model(default_model, **settings), tokens)
        print(f"\nperplexity of {name}: {found:.4f}")
        return found

    return compute


@torch.inference_mode()
def perplexity_of(model: CausalModel, tokens: list[int]) -> float:
    """exp of the mean negative log-likelihood; all windows at once, a token a step, as a worker decodes."""
    blocks = WINDOW // BLOCK_SIZE
    windows = [tokens[start : start + WINDOW] for start in range(0, len(tokens), WINDOW)]
    runner = build_model_runner(model, block_size=BLOCK_SIZE, kv_blocks=blocks * len(windows), max_model_len=WINDOW)
    sequences = [make_sequence(each[:1], list(range(i * blocks, (i + 1) * blocks))) for i, each in enumerate(windows)]
    total, scored = 0.0, 0
    for position in range(WINDOW - 1):
        active = [i for i, window in enumerate(windows) if position + 1 < len(window)]
        logits = runner.forward(Batch(tuple(Slice(sequences[i], position, 1) for i in active)))
        following = [windows[i][position + 1] for i in active]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(following), reduction="sum").item()
        for i, token in zip(active, following, strict=True):
            sequences[i].tokens.append(token)
        scored += len(active)
    assert scored == len(tokens) - len(windows)
    return math.exp(total / scored)


def test_compiled_float32_equals_native_float32(perplexity: Callable[[str], float]) -> None:
    assert perplexity("float32") == pytest.approx(perplexity("native float32"), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "reference", "worse"),
    [("bfloat16", "float32", 0.002), ("int8", "bfloat16", 0.005), ("int4", "bfloat16", 0.05)],
)
def test_fewer_bits_cost_little(name: str, reference: str, worse: float, perplexity: Callable[[str], float]) -> None:
    assert perplexity(name) == pytest.approx(perplexity(reference), rel=worse)
