"""The fast path: Llama-shaped models (Llama, SmolLM, Mistral, Qwen2, Qwen3) over paged KV.

Knows no sequences and no blocks, only a step's rows; how the arithmetic runs is up to the kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from services.worker.engine.kernels.interface import Kernels
from services.worker.engine.kernels.paged_kv import LayerKV
from services.worker.engine.kernels.step_inputs import StepInputs
from services.worker.engine.model.checkpoint import Checkpoint
from services.worker.engine.model.interface import ModelError, ModelFacts
from services.worker.engine.model.llama_config import LlamaConfig
from services.worker.engine.model.rope import cos_and_signed_sin, inverse_frequencies


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """weight [out, in]; bias [out] or none."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class LlamaLayer:
    """One layer's weights. Projections that read the same input are one matrix."""

    attention_norm: Tensor  # [hidden]
    qkv: Linear  # out: heads, then KV heads for K, then for V, each of head_dim
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    attention_out: Linear
    mlp_norm: Tensor  # [hidden]
    gate_up: Linear  # out: gate, then up
    down: Linear


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

    def forward(self, step: StepInputs, layers: Sequence[LayerKV]) -> Tensor:
        config, weights, kernels = self._config, self._weights, self._kernels
        rotation = cos_and_signed_sin(step.positions, self._frequencies, weights.norm.dtype)
        hidden = F.embedding(step.tokens, weights.embedding)
        for layer, kv, window in zip(weights.layers, layers, config.windows, strict=True):
            normed = kernels.rms_norm(hidden, layer.attention_norm, config.norm_eps)
            hidden = hidden + self._attention(normed, layer, kv, step, rotation, window)
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
    with Checkpoint(folder) as checkpoint:
        weights = _WeightReader(checkpoint, config, dtype, device).read()
        unknown = sorted(name for name in checkpoint.unread if not name.endswith("rotary_emb.inv_freq"))
        if config.tied_embeddings and unknown == ["lm_head.weight"]:
            unknown = []
    if unknown:
        raise ModelError(f"The checkpoint has {len(unknown)} tensors that a Llama-shaped model has not: {unknown[:3]}.")
    return LlamaModel(config, weights, kernels)


class _WeightReader:
    """Maps the names of Hugging Face checkpoints to LlamaWeights."""

    def __init__(self, checkpoint: Checkpoint, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._dtype = dtype
        self._device = device

    def read(self) -> LlamaWeights:
        config = self._config
        embedding = self._tensor("model.embed_tokens.weight", config.vocabulary_size, config.hidden_size)
        layers = tuple(self._layer(f"model.layers.{index}") for index in range(config.layers))
        norm = self._tensor("model.norm.weight", config.hidden_size)
        head = embedding
        if not config.tied_embeddings:
            head = self._tensor("lm_head.weight", config.vocabulary_size, config.hidden_size)
        return LlamaWeights(embedding, layers, norm, head)

    def _layer(self, prefix: str) -> LlamaLayer:
        config = self._config
        hidden, inner = config.hidden_size, config.intermediate_size
        q_size, kv_size = config.heads * config.head_dim, config.kv_heads * config.head_dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LlamaLayer(
            attention_norm=self._tensor(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self._linear(
                {f"{attention}.q_proj": q_size, f"{attention}.k_proj": kv_size, f"{attention}.v_proj": kv_size}, hidden
            ),
            q_norm=self._tensor(f"{attention}.q_norm.weight", config.head_dim) if config.qk_norm else None,
            k_norm=self._tensor(f"{attention}.k_norm.weight", config.head_dim) if config.qk_norm else None,
            attention_out=self._linear({f"{attention}.o_proj": hidden}, q_size),
            mlp_norm=self._tensor(f"{prefix}.post_attention_layernorm.weight", hidden),
            gate_up=self._linear({f"{mlp}.gate_proj": inner, f"{mlp}.up_proj": inner}, hidden),
            down=self._linear({f"{mlp}.down_proj": hidden}, inner),
        )

    def _linear(self, out_sizes: dict[str, int], in_size: int) -> Linear:
        """Projections of one input as one, in order; a bias where the checkpoint has one for each of them."""
        weights = [self._tensor(f"{name}.weight", size, in_size) for name, size in out_sizes.items()]
        biased = [f"{name}.bias" in self._checkpoint for name in out_sizes]
        if not any(biased):
            return Linear(_joined(weights))
        return Linear(
            _joined(weights), _joined([self._tensor(f"{name}.bias", size) for name, size in out_sizes.items()])
        )

    def _tensor(self, name: str, *shape: int) -> Tensor:
        return self._checkpoint.read(name, shape, self._dtype, self._device)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
