"""Reads a Llama-shaped checkpoint into the layout of the compiled kernels, quantized on the way if asked."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.packing import Arena, PackedLinear, pack, packed_bytes, padded_columns
from services.worker.engine.kernels.compiled.tiles import GROUP
from services.worker.engine.model.interface import Quantization
from services.worker.engine.model.llama_config import LlamaConfig
from services.worker.engine.model.llama_weights import Linear, open_llama

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeights:
    """A model's weights as the compiled step reads them."""

    embedding: npt.NDArray[np.generic]  # [vocabulary, hidden], float32 or the bits of bfloat16
    linears: tuple[PackedLinear, ...]  # per layer: qkv, attention out, gate and up, down; last the head
    biases: tuple[Floats | None, ...]  # of the linears, as wide as their padded columns
    norms: Floats  # [2 * layers + 1, hidden]: before attention and before the MLP of each layer, and the last one
    qk_norms: Floats  # [layers, 2, head_dim]; ones where the model has none

    @property
    def nbytes(self) -> int:
        own = self.embedding.nbytes + self.norms.nbytes + self.qk_norms.nbytes
        return own + sum(each.nbytes for each in self.linears)


def why_not_compiled(
    config: LlamaConfig, isa: Isa, dtype: torch.dtype, quantize: Quantization, block_size: int
) -> str | None:
    """Why the compiled kernels cannot run this model; None if they can."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype} is neither float32 nor bfloat16"
    if block_size % isa.lanes:
        return f"the block size {block_size} is no multiple of {isa.lanes}, the {isa.name} vector"
    grain = GROUP if quantize == "int4" else isa.lanes
    if config.head_dim % grain:
        return f"the head size {config.head_dim} is no multiple of {grain}"
    sizes = (config.hidden_size, config.intermediate_size, config.heads * config.head_dim)
    if any(size % GROUP for size in sizes):
        return f"its sizes {sizes} are not all multiples of {GROUP}"
    return None


def weight_bits(dtype: torch.dtype, quantize: Quantization) -> tuple[int, int]:
    """Of the layers' weights and of the head's, 8 where the layers have 4: all outputs hang on it."""
    bits = {"int8": 8, "int4": 4}.get(quantize, 8 * dtype.itemsize)
    return bits, max(bits, 8)


def matrix_bytes(config: LlamaConfig, isa: Isa, bits: int, head_bits: int) -> int:
    """Of all matrices once packed, which is what a step reads of weights."""
    layers = config.layers * sum(packed_bytes(columns, depth, bits, isa) for columns, depth in config.layer_matrices)
    return layers + packed_bytes(config.vocabulary_size, config.hidden_size, head_bits, isa)


def read_packed_weights(
    folder: Path, config: LlamaConfig, isa: Isa, dtype: torch.dtype, quantize: Quantization
) -> PackedWeights:
    """The checkpoint in `folder`, one matrix after the other, so that it is never in memory as a whole."""
    bits, head_bits = weight_bits(dtype, quantize)
    linears: list[PackedLinear] = []
    biases: list[Floats | None] = []
    norms: list[Tensor] = []
    qk_norms: list[Tensor] = []
    arena = Arena(matrix_bytes(config, isa, bits, head_bits))
    with open_llama(folder, config, torch.float32, torch.device("cpu")) as reader:
        for index in range(config.layers):
            layer = reader.layer(index)
            for linear in (layer.qkv, layer.attention_out, layer.gate_up, layer.down):
                linears.append(pack(linear.weight, bits, isa, arena))
                biases.append(_bias(linear, isa))
            norms += [layer.attention_norm, layer.mlp_norm]
            ones = torch.ones(config.head_dim)
            qk_norms += [ones if norm is None else norm for norm in (layer.q_norm, layer.k_norm)]
        norms.append(reader.norm())
        embedding = reader.embedding()
        linears.append(pack(embedding if config.tied_embeddings else reader.head(), head_bits, isa, arena))
    return PackedWeights(
        embedding=_embedding(embedding, dtype),
        linears=tuple(linears),
        biases=(*biases, None),
        norms=torch.stack(norms).numpy(),
        qk_norms=torch.stack(qk_norms).view(config.layers, 2, config.head_dim).numpy(),
    )


def _embedding(embedding: Tensor, dtype: torch.dtype) -> npt.NDArray[np.generic]:
    if dtype == torch.bfloat16:
        return embedding.to(torch.bfloat16).view(torch.uint16).numpy()
    return embedding.numpy()


def _bias(linear: Linear, isa: Isa) -> Floats | None:
    if linear.bias is None:
        return None
    out = np.zeros(padded_columns(len(linear.bias), isa), np.float32)
    out[: len(linear.bias)] = linear.bias.numpy()
    return out
