"""What the engine needs of a model, however it is implemented."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from services.worker.engine.kernels.paged_kv import LayerKV, LayerShape
from services.worker.engine.kernels.step_inputs import StepInputs


class ModelError(Exception):
    """A model cannot be found, read or run as asked. One sentence for whoever starts the worker."""


class ModelUnavailable(ModelError):
    """The model cannot be had at this moment; a later try may succeed."""


def first_line(error: Exception) -> str:
    """For a ModelError about another library's error, whose message may run over many lines or be empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is fixed once a model is loaded."""

    implementation: str  # "native" or "transformers"
    vocabulary_size: int  # width of the logits
    max_context_tokens: int  # positions the model was made for
    layer_shapes: tuple[LayerShape, ...]
    weight_bytes: int
    dtype: torch.dtype
    device: torch.device


class CausalModel(Protocol):
    """Computes one step over paged KV."""

    @property
    def facts(self) -> ModelFacts: ...

    def forward(self, step: StepInputs, layers: Sequence[LayerKV]) -> Tensor:
        """Writes the step's KV into `layers`; float32 logits [len(step.sampled_rows), vocabulary_size]."""
        ...
