"""What the engine needs of a model, however it is implemented."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from services.worker.engine.batcher import Batch
from services.worker.engine.kernels.paged_kv import LayerShape, PagedKV

Quantization = Literal["none", "int8", "int4"]


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

    implementation: str  # "compiled", "native", "transformers" or "echo"
    vocabulary_size: int  # width of the logits
    max_context_tokens: int  # positions the model was made for
    layer_shapes: tuple[LayerShape, ...]
    weight_bytes: int
    dtype: torch.dtype
    device: torch.device
    quantization: Quantization = "none"
    instruction_set: str = ""  # what compiled code was compiled for
    # What a row's logits depend on beside its tokens: on nothing else in the step, nor on how its prompt was cut into
    # steps, nor on whose KV it found, as long as this string is the same. Empty: on all of that.
    numerics: str = ""


class CausalModel(Protocol):
    """Computes one step over paged KV."""

    @property
    def facts(self) -> ModelFacts: ...

    def forward(self, batch: Batch, kv: PagedKV) -> Tensor:
        """Writes the batch's KV into `kv`; float32 logits [rows that sample, vocabulary_size], in slice order.

        A slice that samples has a row for its last token and one for each of its drafts. The logits may be overwritten
        by the next call.
        """
        ...
