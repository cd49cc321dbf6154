"""The memory of the block pool: keys and values of all layers, allocated once.

Block-major: one block's keys and values of all layers are one contiguous run of bytes, so that a block moves between
workers as one copy. Within a block, layer after layer, first K as [kv_heads, head_dim, block_size], then V as
[kv_heads, block_size, head_dim]: so one vector instruction takes the same element of 16 keys, or 16 elements of one
value, and no sum runs across a vector. Knows nothing of sequences, of hashes, or of which blocks are in use.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.worker.engine.kernels.touch_ahead import TouchAhead


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps per token."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements_per_token(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True, eq=False)
class LayerKV:
    """One layer's view of the pool: key [blocks, kv_heads, key_dim, block_size], value [.., block_size, value_dim].

    Both are strided by block (see the module's layout) and contiguous within one.
    """

    key: Tensor
    value: Tensor


def block_bytes(shapes: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return sum(shape.elements_per_token for shape in shapes) * block_size * dtype.itemsize


class PagedKV:
    """Zeroed storage for `num_blocks` blocks of `block_size` tokens.

    `storage` is [num_blocks, elements per block]; `layers` are views of it. Never-written slots must stay finite,
    because masked positions are multiplied by a weight of zero; hence zeroed.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.block_bytes = block_bytes(shapes, block_size, dtype)
        self.storage = _zeroed(num_blocks, self.block_bytes, dtype, device)
        self.layers = self._views(shapes)
        on_cpu = device.type == "cpu"
        self._ahead = TouchAhead(self.storage.view(torch.uint8).view(-1).numpy()) if on_cpu else None

    def reach(self, block: int) -> None:
        """This block is written next. What the system must do for those behind it, it does ahead of their use."""
        if self._ahead is not None:
            self._ahead.reach((block + 1) * self.block_bytes)

    def read(self, block: int) -> memoryview:
        """The bytes of a block, `block_bytes` of them; on a CPU a view of the pool itself."""
        row = self.storage[block].view(torch.uint8)
        return memoryview((row if row.device.type == "cpu" else row.cpu()).numpy().data).toreadonly()

    def write(self, block: int, data: bytes | memoryview) -> None:
        """Overwrites a block."""
        if len(data) != self.block_bytes:
            raise ValueError(f"a block has {self.block_bytes} bytes, not {len(data)}")
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # "not writable": it is only read
            source = torch.frombuffer(data, dtype=torch.uint8)
        self.storage[block].view(torch.uint8).copy_(source)

    def _views(self, shapes: Sequence[LayerShape]) -> tuple[LayerKV, ...]:
        layers, offset = [], 0
        for shape in shapes:
            views = []
            for size in ((shape.key_dim, self.block_size), (self.block_size, shape.value_dim)):
                length = shape.kv_heads * size[0] * size[1]
                part = self.storage[:, offset : offset + length]
                views.append(part.view(self.num_blocks, shape.kv_heads, *size))
                offset += length
            layers.append(LayerKV(*views))
        return tuple(layers)


def _zeroed(num_blocks: int, block_bytes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(num_blocks, block_bytes // dtype.itemsize, dtype=dtype, device=device)
    # NumPy takes zero pages from the system as they are first touched: a big pool neither delays the start nor
    # takes much memory that it has not used yet. torch.zeros would write all of it.
    return torch.from_numpy(np.zeros((num_blocks, block_bytes), dtype=np.uint8)).view(dtype)
