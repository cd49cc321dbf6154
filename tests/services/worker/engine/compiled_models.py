"""Compiled models and their exact twins in plain torch, and the steps by which tests compare them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.kernels.compiled.hadamard import transformed, transformed_back
from services.worker.engine.kernels.compiled.isa import Isa, choose_isa
from services.worker.engine.kernels.compiled.packing import Arena, pack, packed_bytes, unpack
from services.worker.engine.kernels.compiled.tiles import GROUP
from services.worker.engine.kernels.paged_kv import LayerKV, PagedKV
from services.worker.engine.kernels.plain import PlainKernels
from services.worker.engine.kernels.step_inputs import AttentionGroup, StepInputs
from services.worker.engine.model.checkpoint import read_config
from services.worker.engine.model.compiled_llama import CompiledLlama, load_compiled_llama
from services.worker.engine.model.interface import CausalModel, Quantization
from services.worker.engine.model.llama import LlamaModel, load_llama
from services.worker.engine.model.llama_config import parse_llama_config
from services.worker.engine.sequence import SamplingParams, StopParams
from services.worker.engine.sequence import Sequence as EngineSequence

BLOCK_SIZE = 16
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Precision:
    """How a compiled model keeps its weights."""

    dtype: torch.dtype
    quantize: Quantization = "none"

    @property
    def bits(self) -> int:
        return {"int8": 8, "int4": 4}.get(self.quantize, 8 * self.dtype.itemsize)


PRECISIONS = {
    "float32": Precision(torch.float32),
    "bfloat16": Precision(torch.bfloat16),
    "int8": Precision(torch.float32, "int8"),
    "int8 bfloat16": Precision(torch.bfloat16, "int8"),
    "int4": Precision(torch.float32, "int4"),
    "int4 bfloat16": Precision(torch.bfloat16, "int4"),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence's work: the prompt up to each of `cuts` at a time, then a token per step until all are computed."""

    tokens: list[int]
    cuts: tuple[int, ...]  # ascending; the last is the prompt's length
    begins: int = 0  # at which step


def load_compiled(
    folder: Path, precision: Precision, *, kernels: Path | None = None, threads: int = 2
) -> CompiledLlama:
    config = parse_llama_config(read_config(folder))
    return load_compiled_llama(
        folder,
        config,
        choose_isa(),
        precision.dtype,
        precision.quantize,
        block_size=BLOCK_SIZE,
        threads=threads,
        kernels=kernels,
    )


def load_twin(folder: Path, precision: Precision, scratch: Path, isa: Isa | None = None) -> LlamaModel:
    """The plain float32 model that does the same arithmetic; `scratch` is an empty folder for its weights.

    Its weights are those that the compiled one's stand for. Where that one, made for `isa` (None: this machine's best),
    rounds activations, or what enters attention, so does this. Its pool is to have the compiled one's type.
    """
    weights = load_file(folder / "model.safetensors")
    save_file({name: _as_kept(name, each, precision) for name, each in weights.items()}, scratch / "model.safetensors")
    (scratch / "config.json").write_bytes((folder / "config.json").read_bytes())
    isa = isa or choose_isa()
    rounds_attention = isa.activation_bits(8 * precision.dtype.itemsize) == 16
    kernels = RoundingKernels(
        _rounding(isa, precision.bits), _rounding(isa, max(precision.bits, 8)), rounds_attention=rounds_attention
    )
    model = load_llama(scratch, parse_llama_config(read_config(scratch)), kernels, torch.float32, CPU)
    kernels.last_norm = model._weights.norm
    return model


def _as_kept(name: str, weight: Tensor, precision: Precision) -> Tensor:
    """What the compiled model makes of a weight: norms and biases stay, the embedding is but rounded."""
    if weight.ndim == 1:
        return weight
    if name == "model.embed_tokens.weight":
        return weight.to(precision.dtype).float()
    bits = max(precision.bits, 8) if name == "lm_head.weight" else precision.bits
    isa = Isa(
        "avx512", lanes=16, accumulators=24, vnni=True, byte_pairs=False, bfloat16_dots=False
    )  # any, since none changes the values
    return unpack(pack(weight, bits, isa, Arena(packed_bytes(*weight.shape, bits, isa))), *weight.shape).clone()


class TwinKernels(PlainKernels):
    """Plain kernels that compute in float32 whatever the pool's type is."""

    def attend(
        self,
        query: Tensor,
        layer: LayerKV,
        step: StepInputs,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        wide = LayerKV(layer.key.float(), layer.value.float())
        return super().attend(query, wide, step, scale=scale, window=window, softcap=softcap)

    def write_kv(self, key: Tensor, value: Tensor, layer: LayerKV, step: StepInputs) -> None:
        super().write_kv(key.to(layer.key.dtype), value.to(layer.value.dtype), layer, step)


class RoundingKernels(TwinKernels):
    """What enters a product with weights is rounded; where `rounds_attention`, queries and attention's weights too.

    The latter to bfloat16, and as they are before they are divided by their sum: relative to the largest.
    """

    def __init__(
        self,
        round_: Callable[[Tensor], Tensor],
        round_for_head: Callable[[Tensor], Tensor],
        *,
        rounds_attention: bool,
    ) -> None:
        self._round = round_
        self._round_for_head = round_for_head
        self.last_norm: Tensor | None = None  # before the head
        self._rounds_attention = rounds_attention

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed = super().rms_norm(x, weight, eps)
        if x.ndim == 3:  # of attention's heads
            return normed
        return self._round_for_head(normed) if weight is self.last_norm else self._round(normed)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return self._round(super().swiglu(gate_up))

    def attend(
        self,
        query: Tensor,
        layer: LayerKV,
        step: StepInputs,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        if not self._rounds_attention:
            out = super().attend(query, layer, step, scale=scale, window=window, softcap=softcap)
            return self._round(out.flatten(1)).view_as(out)
        query, out = to_bfloat16(query * scale * math.log2(math.e)), torch.empty_like(query)
        for group in step.groups:
            key, value = (_context(pool.float(), group) for pool in (layer.key.transpose(2, 3), layer.value))
            rows = query[group.rows].view(group.slices, group.query_length, *query.shape[1:]).transpose(1, 2)
            heads = rows.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
            scores = rows @ key.transpose(2, 3) + group.bias(window, query.dtype)
            weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
            outputs = to_bfloat16(weights) @ value / weights.sum(-1, keepdim=True)
            out[group.rows] = outputs.transpose(1, 2).flatten(0, 1)
        return self._round(out.flatten(1)).view_as(out)


def _context(pool: Tensor, group: AttentionGroup) -> Tensor:
    """[slices, kv_heads, context_length, head_dim] of a pool [blocks, kv_heads, block_size, head_dim]."""
    return pool[group.tables].transpose(1, 2).flatten(2, 3)[:, :, : group.context_length]


def groups_to_eight_bits(x: Tensor) -> Tensor:
    """Each group's nearest of 255 evenly spaced values up to its largest magnitude."""
    return _to_eight_bits(x.unflatten(-1, (-1, GROUP))).flatten(-2)


def rows_to_eight_bits(x: Tensor) -> Tensor:
    """Likewise of whole rows, while they are transformed."""
    return transformed_back(_to_eight_bits(transformed(x)))


def _to_eight_bits(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (x / step).round() * step


def to_bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _rounding(isa: Isa, bits: int) -> Callable[[Tensor], Tensor]:
    """What happens to activations before they meet weights of so many bits."""
    if bits == 8:
        return rows_to_eight_bits
    return {32: lambda x: x, 16: to_bfloat16, 8: groups_to_eight_bits}[isa.activation_bits(bits)]


class Pool:
    """KV blocks for one model, handed out in random order."""

    def __init__(
        self,
        model: CausalModel,
        *,
        dtype: torch.dtype | None = None,
        blocks: int = 64,
        fill: float = 0.0,
        seed: int = 1,
    ) -> None:
        self.kv = PagedKV(model.facts.layer_shapes, blocks, BLOCK_SIZE, dtype or model.facts.dtype, CPU)
        if fill:
            self.kv.storage.fill_(fill)
        self._free = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()

    def take(self, count: int) -> list[int]:
        return [self._free.pop() for _ in range(count)]


@dataclass(slots=True)
class _Running:
    """A job under way."""

    job: Job
    sequence: EngineSequence
    logits: list[Tensor]
    computed: int = 0

    @property
    def finished(self) -> bool:
        return self.computed == len(self.job.tokens)

    def next_slice(self) -> Slice:
        start = self.computed
        end = next((cut for cut in self.job.cuts if cut > start), start + 1)
        # A sequence holds its whole prompt from the start, and then what has been generated.
        known = max(end, self.job.cuts[-1])
        self.sequence.tokens += self.job.tokens[len(self.sequence.tokens) : known]
        self.computed = end
        return Slice(self.sequence, start, end - start)


@torch.inference_mode()
def serve(model: CausalModel, pool: Pool, jobs: Sequence[Job]) -> list[Tensor]:
    """All jobs together; for each the logits [tokens after the prompt + 1, vocabulary] that it sampled from."""
    running = [_start(job, pool) for job in jobs]
    step = 0
    while not all(each.finished for each in running):
        active = [each for each in running if each.job.begins <= step and not each.finished]
        pieces = sorted(((each.next_slice(), each) for each in active), key=lambda pair: pair[0].length > 1)
        if pieces:
            logits = model.forward(Batch(tuple(piece for piece, _ in pieces)), pool.kv).clone()
            sampling = [each for piece, each in pieces if piece.samples]
            assert len(logits) == len(sampling)
            for each, row in zip(sampling, logits, strict=True):
                each.logits.append(row)
        step += 1
    return [torch.stack(each.logits) for each in running]


def _start(job: Job, pool: Pool) -> _Running:
    prompt = job.tokens[: job.cuts[-1]]
    sequence = EngineSequence("key", list(prompt), len(prompt), SamplingParams(), StopParams(max_tokens=1000))
    sequence.blocks = pool.take(-(-len(job.tokens) // BLOCK_SIZE))
    return _Running(job, sequence, [])


def random_tokens(length: int, *, seed: int, vocabulary: int = 99) -> list[int]:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def mixed_jobs() -> list[Job]:
    """Decodes beside prefills in chunks that start before, at and inside a block's end, and more rows than a tile."""
    shapes: list[tuple[int, tuple[int, ...], int]] = [
        (9, (1,), 0),
        (40, (16, 32), 0),
        (60, (5, 23, 52), 1),
        (97, (90,), 2),
        (31, (15, 17, 30), 2),
        (22, (21,), 4),
    ]
    return [Job(random_tokens(size, seed=size), cuts, begins) for size, cuts, begins in shapes]


def relative_errors(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Of each row of logits, the norm of its error by its own; ascending."""
    rows, exact = torch.cat(list(ours)), torch.cat(list(expected))
    return ((rows - exact).norm(dim=-1) / exact.norm(dim=-1)).sort().values
