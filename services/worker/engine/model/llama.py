"""The native path: Llama-shaped models (Llama, SmolLM, Mistral, Qwen2, Qwen3) over paged KV, in torch.

Knows no sequences and no blocks, only a step's rows; how the arithmetic runs is up to the kernels. On CPUs
`compiled_llama` takes its place, and is tested against it.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from services.worker.engine.batcher import Batch
from services.worker.engine.kernels.interface import Kernels
from services.worker.engine.kernels.paged_kv import LayerKV, PagedKV
from services.worker.engine.kernels.step_inputs import StepInputs, begin_step
from services.worker.engine.model.interface import ModelFacts
from services.worker.engine.model.llama_config import LlamaConfig
from services.worker.engine.model.llama_weights import Linear, LlamaLayer, open_llama
from services.worker.engine.model.rope import cos_and_signed_sin, inverse_frequencies


@dataclass(frozen=True, slots=True, eq=False)
class LlamaWeights:
    """All weights of a model. `head` is `embedding` itself where the two are tied."""

    embedding: Tensor  # [vocabulary, hidden]
    layers: tuple[LlamaLayer, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocabulary, hidden]

    @property
    def nbytes(self) -> int:
        matrices = {id(tensor): tensor for tensor in (self.embedding, self.norm, self.head)}
        for layer in self.layers:
            for item in fields(layer):
                part = getattr(layer, item.name)
                tensors = (part.weight, part.bias) if isinstance(part, Linear) else (part,)
                matrices |= {id(tensor): tensor for tensor in tensors if tensor is not None}
        return sum(tensor.nbytes for tensor in matrices.values())


class LlamaModel:
    """Fulfills `CausalModel`."""

    def __init__(self, config: LlamaConfig, weights: LlamaWeights, kernels: Kernels) -> None:
        self._config = config
        self._weights = weights
        self._kernels = kernels
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).to(weights.norm.device)
        self._facts = ModelFacts(
            implementation="native",
            vocabulary_size=config.vocabulary_size,
            max_context_tokens=config.max_context_tokens,
            layer_shapes=config.layer_shapes,
            weight_bytes=weights.nbytes,
            dtype=weights.norm.dtype,
            device=weights.norm.device,
        )

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: PagedKV) -> Tensor:
        config, weights, kernels = self._config, self._weights, self._kernels
        step = begin_step(batch, kv, weights.norm.device)
        rotation = cos_and_signed_sin(step.positions, self._frequencies, weights.norm.dtype)
        hidden = F.embedding(step.tokens, weights.embedding)
        for layer, layer_kv, window in zip(weights.layers, kv.layers, config.windows, strict=True):
            normed = kernels.rms_norm(hidden, layer.attention_norm, config.norm_eps)
            hidden = hidden + self._attention(normed, layer, layer_kv, step, rotation, window)
            normed = kernels.rms_norm(hidden, layer.mlp_norm, config.norm_eps)
            hidden = hidden + layer.down(kernels.swiglu(layer.gate_up(normed)))
        sampled = kernels.rms_norm(hidden[step.sampled_rows], weights.norm, config.norm_eps)
        return F.linear(sampled, weights.head).float()

    def _attention(
        self,
        x: Tensor,
        layer: LlamaLayer,
        kv: LayerKV,
        step: StepInputs,
        rotation: tuple[Tensor, Tensor],
        window: int | None,
    ) -> Tensor:
        config, kernels = self._config, self._kernels
        rotated_heads = config.heads + config.kv_heads
        qkv = layer.qkv(x).view(len(x), -1, config.head_dim)
        query_key, value = qkv[:, :rotated_heads], qkv[:, rotated_heads:]
        if layer.q_norm is not None and layer.k_norm is not None:
            query = kernels.rms_norm(query_key[:, : config.heads], layer.q_norm, config.norm_eps)
            key = kernels.rms_norm(query_key[:, config.heads :], layer.k_norm, config.norm_eps)
            query_key = torch.cat((query, key), dim=1)
        query_key = kernels.rotate(query_key, *rotation)
        kernels.write_kv(query_key[:, config.heads :], value, kv, step)
        attended = kernels.attend(query_key[:, : config.heads], kv, step, scale=config.head_dim**-0.5, window=window)
        return layer.attention_out(attended.flatten(1))


def load_llama(
    folder: Path, config: LlamaConfig, kernels: Kernels, dtype: torch.dtype, device: torch.device
) -> LlamaModel:
    """Reads the checkpoint in `folder`; each tensor is copied once, to where and what it shall be."""
    with open_llama(folder, config, dtype, device) as reader:
        embedding = reader.embedding()
        layers = tuple(reader.layer(index) for index in range(config.layers))
        head = embedding if config.tied_embeddings else reader.head()
        weights = LlamaWeights(embedding, layers, reader.norm(), head)
    return LlamaModel(config, weights, kernels)
