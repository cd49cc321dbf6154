"""The tensors of a Llama-shaped checkpoint, by what they are for; projections of one input come as one matrix."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from services.worker.engine.model.checkpoint import Checkpoint
from services.worker.engine.model.interface import ModelError
from services.worker.engine.model.llama_config import LlamaConfig


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


@contextmanager
def open_llama(folder: Path, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Iterator["LlamaReader"]:
    """A reader of the checkpoint in `folder`, of which all is to be read: ModelError if something is left."""
    with Checkpoint(folder) as checkpoint:
        yield LlamaReader(checkpoint, config, dtype, device)
        unknown = sorted(name for name in checkpoint.unread if not name.endswith("rotary_emb.inv_freq"))
        if config.tied_embeddings and unknown == ["lm_head.weight"]:
            unknown = []
    if unknown:
        raise ModelError(f"The checkpoint has {len(unknown)} tensors that a Llama-shaped model has not: {unknown[:3]}.")


class LlamaReader:
    """Maps the names of Hugging Face checkpoints. Each call copies from the file."""

    def __init__(self, checkpoint: Checkpoint, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._dtype = dtype
        self._device = device

    def embedding(self) -> Tensor:
        """[vocabulary, hidden]"""
        return self._tensor("model.embed_tokens.weight", self._config.vocabulary_size, self._config.hidden_size)

    def head(self) -> Tensor:
        """[vocabulary, hidden] of a model whose head is not its embedding."""
        return self._tensor("lm_head.weight", self._config.vocabulary_size, self._config.hidden_size)

    def norm(self) -> Tensor:
        """[hidden]: the one before the head."""
        return self._tensor("model.norm.weight", self._config.hidden_size)

    def layer(self, index: int) -> LlamaLayer:
        config, prefix = self._config, f"model.layers.{index}"
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
