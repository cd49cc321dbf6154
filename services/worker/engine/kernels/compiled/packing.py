"""Weights in the layout that tiles read, whole precision or quantized. Done once, when a model is loaded.

Panels: [panels][k / per_word][panel_columns] 32-bit words, so that a tile streams one run of memory. A word holds
successive k of one column: 1 float32, 2 bfloat16 (the first in the low half), 4 bytes, or 8 nibbles, of which byte i
has k = i in its low and k = 4 + i in its high half. Missing columns and k are zeros.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.worker.engine.kernels.compiled.hadamard import transformed, transformed_back
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.tiles import GROUP, RUN_BYTES

Words = npt.NDArray[np.uint32]
Scalar = TypeVar("Scalar", bound=np.generic)

_ALIGNMENT = 64
_COLUMNS_AT_ONCE = 4096  # that are transformed, which takes memory


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A weight matrix [columns, k] as panels.

    8-bit weights are transformed along k (see `hadamard`). `scales` is float32 [panels, panel_columns] for them,
    float16 [panels, groups, 2, panel_columns] (step, then least value) for 4-bit ones, and empty otherwise.
    """

    words: Words  # [panels, k / per_word, panel_columns]
    scales: npt.NDArray[np.floating[Any]]
    bits: int  # 32, 16, 8 or 4

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes


class Arena:
    """One run of memory that many arrays are cut from: large enough for the system to give it in huge pages."""

    def __init__(self, nbytes: int) -> None:
        self._memory = aligned_zeros((nbytes,), np.uint8)
        self._used = 0

    def copy(self, array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """A contiguous copy of `array` in the arena, which must have room for it."""
        start, end = self._used, self._used + array.nbytes
        if end > len(self._memory):
            raise ValueError(f"the arena of {len(self._memory)} bytes has no room for {array.nbytes} after {start}")
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        out = self._memory[start:end].view(array.dtype).reshape(array.shape)
        out[...] = array
        return out


def packed_bytes(columns: int, depth: int, bits: int, isa: Isa) -> int:
    """What a matrix takes of an arena."""
    padded, deep = padded_columns(columns, isa), padded_depth(depth, bits)
    scales = {8: 4 * padded, 4: 2 * padded * (deep // GROUP) * 2}.get(bits, 0)
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in (padded * deep * bits // 8, scales))


def padded_columns(columns: int, isa: Isa) -> int:
    """Columns of a matrix once packed."""
    return -(-columns // isa.panel_columns) * isa.panel_columns


def padded_depth(depth: int, bits: int) -> int:
    """k of a matrix once packed."""
    grain = RUN_BYTES if bits == 8 else GROUP
    return -(-depth // grain) * grain


def pack(weight: Tensor, bits: int, isa: Isa, arena: Arena) -> PackedLinear:
    """Packs `weight` [columns, k] of any floating-point type with `bits` per weight, into `arena`.

    With 8 bits k is a multiple of GROUP.
    """
    scales: npt.NDArray[np.floating[Any]] = np.empty((0, 0), np.float32)
    if bits == 8:
        numbers, step = quantize_bytes(_padded(_transformed(weight), bits, isa))
        rows, scales = numbers.numpy(), step.numpy().reshape(-1, isa.panel_columns)
    elif bits == 4:
        numbers, step, least = quantize_nibbles(_padded(weight.float(), bits, isa))
        eights = numbers.numpy().reshape(len(numbers), -1, 2, 4)
        rows = (eights[:, :, 0] | eights[:, :, 1] << 4).reshape(len(numbers), -1)
        scales = _scale_panels([step, least], isa)
    elif bits == 16:
        rows = _padded(weight.to(torch.bfloat16), bits, isa).view(torch.uint16).numpy()
    else:
        rows = _padded(weight.float(), bits, isa).numpy()
    words = rows.view(np.uint32)
    panels = words.reshape(-1, isa.panel_columns, words.shape[1]).transpose(0, 2, 1)
    return PackedLinear(arena.copy(panels), arena.copy(scales), bits)


def _transformed(weight: Tensor) -> Tensor:
    """float32. Summed in float64: in which order, torch decides anew for each number of threads, and no byte may hang
    on that.
    """
    return torch.cat([transformed(part.double()).float() for part in torch.split(weight, _COLUMNS_AT_ONCE)])


def quantize_bytes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest of 255 evenly spaced values up to each column's largest magnitude.

    weight float32 [columns, k]; returns numbers 1..255 uint8 [columns, k], 128 standing for 0, and the step, float32
    [columns].
    """
    step = weight.abs().amax(dim=-1) / 127
    numbers = (weight / _divisor(step)[..., None]).round_().clamp_(-127, 127).add_(128)
    return numbers.to(torch.uint8), step


def quantize_nibbles(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest of 16 evenly spaced values between each group's extremes, as GGUF's Q4_1 has it.

    weight float32 [columns, k], k a multiple of GROUP; returns numbers 0..15 uint8 [columns, k], and step and least
    value, each float16 [columns, groups]. Weights that came from a Q4_1 file keep their values exactly.
    """
    groups = weight.view(len(weight), -1, GROUP)
    least = groups.amin(dim=-1).half()
    step = ((groups.amax(dim=-1) - least.float()) / 15).half()
    numbers = ((groups - least.float()[..., None]) / _divisor(step)[..., None]).round_().clamp_(0, 15)
    return numbers.to(torch.uint8).flatten(1), step, least


def unpack(packed: PackedLinear, columns: int, depth: int) -> Tensor:
    """The float32 weights [columns, k] that `packed` stands for: what the tests compare with."""
    words = np.ascontiguousarray(packed.words.transpose(0, 2, 1)).reshape(-1, packed.words.shape[1])
    if packed.bits == 32:
        return torch.from_numpy(words.view(np.float32))[:columns, :depth]
    if packed.bits == 16:
        return torch.from_numpy(words.view(np.uint16)).view(torch.bfloat16).float()[:columns, :depth]
    if packed.bits == 8:
        numbers = torch.from_numpy(words.view(np.uint8)).float() - 128
        return transformed_back((numbers * torch.from_numpy(packed.scales.reshape(-1, 1)))[:columns, :depth])
    scales = packed.scales.astype(np.float32).transpose(0, 3, 1, 2).reshape(len(words), packed.scales.shape[1], -1)
    step, least = scales[..., :1], scales[..., 1:]
    fours = words.view(np.uint8).reshape(len(words), -1, 1, 4)
    nibbles = np.concatenate((fours & 15, fours >> 4), axis=2).reshape(len(words), -1, GROUP)
    return torch.from_numpy((nibbles * step + least).reshape(len(words), -1))[:columns, :depth]


def _divisor(step: Tensor) -> Tensor:
    """float32; groups of equal weights, which have no step, take any."""
    return torch.where(step == 0, torch.ones_like(step), step).float()


def _scale_panels(kinds: list[Tensor], isa: Isa) -> npt.NDArray[np.float16]:
    """float16s of [columns, groups] each as [panels, groups, kinds, panel_columns]."""
    stacked = np.stack([kind.numpy() for kind in kinds], axis=-1)
    return stacked.reshape(-1, isa.panel_columns, *stacked.shape[1:]).transpose(0, 2, 3, 1)


def _padded(weight: Tensor, bits: int, isa: Isa) -> Tensor:
    columns, depth = weight.shape
    out = weight.new_zeros(padded_columns(columns, isa), padded_depth(depth, bits))
    out[:columns, :depth] = weight
    return out


def aligned_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros that start at a cache line; memory is taken from the system as it is first touched."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
