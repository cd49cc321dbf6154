"""What the compiled step is made for, and the frame: where it finds what it works on.

Everything comes as addresses in one array, so that the threads of the team, which wait in compiled code, see each
step's anew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any

from numba import njit

from services.worker.engine.kernels.compiled.activations import put_scratch
from services.worker.engine.kernels.compiled.attention import attention_scratch_bytes, laid_bytes
from services.worker.engine.kernels.compiled.attention_products import by_matrices
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.matrix_linear import GATED_SUMS

Kernel = Callable[..., None]  # of int64s alone, to be compiled

NO_WINDOW = 1 << 40
_MATRIX_QUERIES = 192  # in a tile of attention by matrices: a chunk's keys and values are read from panels for so many


@dataclass(frozen=True, slots=True)
class Shape:
    """What the function is compiled for."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    eps: float
    qk_norm: bool
    block_size: int
    weight_bits: int  # 32, 16, 8, 4
    head_bits: int  # of the head: quantized like the layers or whole like them, but not necessarily with as many bits
    kv_bits: int  # 32 or 16
    embedding_bits: int  # 32 or 16

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


class Frame(IntEnum):
    """What each int64 of a frame is; addresses unless it says otherwise. T rows, S slices."""

    ROWS = 0  # T, a number
    TILE_ROWS = auto()  # rows of a tile, a number
    GROUPS = auto()  # that a step's tiles of rows are shared out by: tile t is in group t % GROUPS; a number
    SLICES = auto()  # S, a number
    SAMPLED = auto()  # rows that sample, a number
    SAMPLED_TILE_ROWS = auto()  # a number
    TOKENS = auto()  # int64 [T]
    POSITIONS = auto()  # int64 [T]
    ROW_BLOCKS = auto()  # int64 [T]: the block that the row's key and value go to
    FIRST_ROWS = auto()  # int64 [S + 1]
    TABLE_STARTS = auto()  # int64 [S]: where a slice's block table begins in TABLES
    TABLES = auto()  # int32
    SAMPLED_ROWS = auto()  # int64 [SAMPLED]
    COS = auto()  # float32 [positions, head_dim / 2]
    SIN = auto()
    KV = auto()  # the pool's storage
    KV_BLOCK_BYTES = auto()  # a number
    EMBEDDING = auto()  # [vocabulary, hidden]
    NORMS = auto()  # float32 [2 * layers + 1, hidden]
    QK_NORMS = auto()  # float32 [layers, 2, head_dim]
    WINDOWS = auto()  # int64 [layers]
    LINEARS = auto()  # int64 [4 * layers + 1, 3]: addresses of words, scales, bias
    # Products have numbers: 4 in each layer, QKV, attention out, gate and up, down; last the head. What number n reads
    # and writes is n * PLACE_BYTES further than these addresses say: in one place for all, or a place of its own.
    PLACE_BYTES = auto()  # a number; 0 where all share one place
    HIDDEN = auto()  # float32 [T, hidden]: what the norms before QKV and before gate and up leave
    DELTA = auto()  # float32 [padded T, padded hidden]: what is still to be added to it
    PRODUCT = auto()  # float32: the product of QKV, or of gate and up
    ATTENDED = auto()  # float32 [T, query_size]: what attention leaves, where activations are put by whole rows
    X = auto()  # activations as tiles read them
    X_GATED = auto()  # those of the product down, which SwiGLU leaves
    X_SCALES = auto()
    X_SUMS = auto()
    LOGITS = auto()  # float32 [padded SAMPLED, padded vocabulary]
    SCRATCH = auto()  # of the first thread
    SCRATCH_BYTES = auto()  # of one thread, a number
    LINEAR = auto()  # functions of the library
    HEAD_LINEAR = auto()
    NORM_ROWS = auto()
    WRITE_KV = auto()
    ATTEND = auto()
    ATTEND_TOKEN = auto()
    ATTEND_TILE = auto()
    PUT_ATTENDED = auto()  # where activations are put by whole rows
    SWIGLU_ROWS = auto()
    GATED_LINEAR = auto()  # with `gates_at_once`, in place of SWIGLU_ROWS and LINEAR of gate and up
    NORM_SAMPLED = auto()


FRAME_FIELDS = len(Frame)


@njit(nogil=True, error_model="numpy")
def place(frame: Any, field: int, product: int) -> int:
    """The address of a field of a product's own place."""
    return frame[field] + product * frame[Frame.PLACE_BYTES]


def tall_rows(isa: Isa, kv_bits: int, head_dim: int) -> int:
    """Queries in a tile of attention, other than of a single token."""
    return _MATRIX_QUERIES if by_matrices(isa, kv_bits, head_dim) else isa.accumulators // 2


def gates_at_once(isa: Isa, shape: Shape) -> bool:
    """Whether gate, up and SwiGLU are one phase."""
    return shape.weight_bits == 16 and isa.uses_matrices(16)


def row_scratch_bytes(isa: Isa, shape: Shape) -> int:
    deepest = max(shape.hidden, shape.intermediate, shape.query_size)
    row = deepest + max(put_scratch(bits, deepest) for bits in (shape.weight_bits, shape.head_bits))
    sums = max(isa.accumulators * isa.lanes, GATED_SUMS if isa.matrices else 0)
    return 4 * max(row, sums)


def scratch_bytes(isa: Isa, shape: Shape) -> int:
    """What one thread needs: a row or a tile's sums, chunks of keys and values, and a tile of attention."""
    row = row_scratch_bytes(isa, shape)
    tile_rows = max(tall_rows(isa, shape.kv_bits, shape.head_dim), shape.heads // shape.kv_heads)
    laid = laid_bytes(isa, shape.kv_bits, shape.head_dim, shape.block_size)
    return row + laid + attention_scratch_bytes(isa, tile_rows, shape.kv_bits, shape.head_dim, shape.block_size)
