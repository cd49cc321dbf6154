"""The bytes of KV blocks between processes: the chunks they travel in, and blocks made of chunks again."""

from collections.abc import Iterator
from dataclasses import dataclass

from headrace.v1.machine_time_pb2 import PricedTime
from services.common.block_digest import digest
from services.common.errors import InvalidRequest

CHUNK_BYTES = 1024 * 1024


class BadBlock(InvalidRequest):
    """What arrived is not what it says it is.

    `reason` is one of `encoding`, `format`, `order`, `size` and `digest`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """One block: its chain hash, its KV bytes, and the digest that whoever computed it published."""

    name: bytes
    data: bytes | memoryview
    digest: bytes


@dataclass(slots=True)
class Chunk:
    """What a KvChunk says, with the names that it has there."""

    kv_format: str
    block_hash: bytes
    data: bytes | memoryview
    offset_bytes: int
    last: bool
    digest: bytes
    spent: PricedTime | None = None


def chunks(kv_format: str, block: BlockBytes) -> Iterator[Chunk]:
    """The chunks that carry a block; their data are views into the block's."""
    data = memoryview(block.data)
    for start in range(0, len(data), CHUNK_BYTES):
        end = min(start + CHUNK_BYTES, len(data))
        last = end == len(data)
        yield Chunk(kv_format, block.name, data[start:end], start, last, block.digest if last else b"")


class BlockAssembler:
    """Makes blocks of the chunks of one stream, and lets none through whose bytes are not those of its digest."""

    def __init__(self, max_block_bytes: int, kv_format: str | None = None) -> None:
        """`kv_format`: the only one that is taken; None takes any."""
        self._max_block_bytes = max_block_bytes
        self._kv_format = kv_format
        self._pieces: list[bytes | memoryview] = []
        self._size = 0
        self._open = ("", b"")  # KV format and chain hash of the block under way

    def take(self, chunk: Chunk) -> BlockBytes | None:
        """The block that this chunk completes, if it does. Raises BadBlock, after which the stream is of no use."""
        self._check(chunk)
        self._open = (chunk.kv_format, chunk.block_hash)
        self._pieces.append(chunk.data)
        self._size += len(chunk.data)
        if not chunk.last:
            return None
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces, self._size = [], 0
        if digest(data) != chunk.digest:
            raise BadBlock("digest", f"The bytes of block {chunk.block_hash.hex()} are not those of its digest.")
        return BlockBytes(chunk.block_hash, data, chunk.digest)

    def _check(self, chunk: Chunk) -> None:
        size = len(chunk.data)
        if self._kv_format is not None and chunk.kv_format != self._kv_format:
            raise BadBlock(
                "format", f"A block of KV format {chunk.kv_format} arrived where {self._kv_format} was asked for."
            )
        if not 0 < size <= CHUNK_BYTES or self._size + size > self._max_block_bytes:
            raise BadBlock("size", f"A chunk of {size} bytes at {self._size} is too small or too large.")
        begun = (chunk.kv_format, chunk.block_hash)
        if chunk.offset_bytes != self._size or (self._size and begun != self._open):
            raise BadBlock("order", f"A chunk of block {chunk.block_hash.hex()} arrived out of order.")
