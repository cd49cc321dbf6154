"""The fastest path on a CPU: a Llama-shaped model whose whole step is one compiled function.

Knows how a step's arrays are laid out for it; the arithmetic is in `kernels.compiled`.
"""

import ctypes
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.worker.engine.batcher import Batch
from services.worker.engine.kernels.compiled.compiling import compile_apart
from services.worker.engine.kernels.compiled.frame import NO_WINDOW, Frame, Shape, scratch_bytes
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.library import Library, kept_library, sources_digest
from services.worker.engine.kernels.compiled.linear import TALLEST, tile_groups, tile_rows
from services.worker.engine.kernels.compiled.packing import aligned_zeros, padded_columns
from services.worker.engine.kernels.compiled.places import Places
from services.worker.engine.kernels.compiled.plan import StepPlan, plan_step
from services.worker.engine.kernels.compiled.step import most_items
from services.worker.engine.kernels.compiled.team import new_control, stop
from services.worker.engine.kernels.paged_kv import PagedKV
from services.worker.engine.model.interface import ModelFacts, Quantization
from services.worker.engine.model.llama_config import LlamaConfig
from services.worker.engine.model.packed_weights import PackedWeights, read_packed_weights, weight_bits
from services.worker.engine.model.rope import inverse_frequencies

Floats = npt.NDArray[np.float32]
_FEWEST_POSITIONS = 1024  # for which cosines are kept from the start
# Steps of at most so many rows keep what each product reads and writes apart, so that threads can help each other.
_ROWS_APART = 12
# Where a step's numbers stand, one after the other.
_NUMBERS = (
    Frame.TOKENS,
    Frame.POSITIONS,
    Frame.ROW_BLOCKS,
    Frame.FIRST_ROWS,
    Frame.TABLE_STARTS,
    Frame.SAMPLED_ROWS,
)


class CompiledLlama:
    """Fulfills `CausalModel`."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: PackedWeights,
        isa: Isa,
        shape: Shape,
        library: Library,
        *,
        dtype: torch.dtype,
        quantize: Quantization,
        threads: int,
    ) -> None:
        self._block_size = shape.block_size
        self._step = _Step(config, weights, isa, shape, library, threads)
        self._facts = ModelFacts(
            implementation="compiled",
            vocabulary_size=config.vocabulary_size,
            max_context_tokens=config.max_context_tokens,
            layer_shapes=config.layer_shapes,
            weight_bytes=weights.nbytes,
            dtype=dtype,
            device=torch.device("cpu"),
            quantization=quantize,
            instruction_set=isa.name,
            numerics=_numerics(isa),
        )

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    def forward(self, batch: Batch, kv: PagedKV) -> Tensor:
        if kv.block_size != self._block_size:
            raise ValueError(f"compiled for blocks of {self._block_size} tokens, not of {kv.block_size}")
        return torch.from_numpy(self._step.run(plan_step(batch, kv.block_size), kv))


class _Step:
    """The compiled function, the threads that run it, and the memory it works in."""

    def __init__(
        self, config: LlamaConfig, weights: PackedWeights, isa: Isa, shape: Shape, library: Library, threads: int
    ) -> None:
        self._config = config
        self._weights = weights
        self._isa = isa
        self._threads = threads
        self._shape = shape
        self._library = library
        self._frame = np.zeros(len(Frame), np.int64)
        self._control = new_control(threads, most_items(isa, shape, _ROWS_APART, threads))
        self._frequencies = inverse_frequencies(config.rope, config.head_dim)
        self._kept: dict[Frame, npt.NDArray[np.generic]] = {}  # what the frame's addresses point at
        self._function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(library.addresses["RUN"])
        self._apart = Places.apart(isa, shape, _ROWS_APART)
        self._shared = Places.shared(isa, shape, 0)
        self._places: Places | None = None  # that the frame speaks of
        self._sampled = self._context = 0  # that there is room for
        self._numbers, self._numbers_at = np.empty(0, np.int64), 0
        self._tables = np.empty(0, np.int32)
        self._set_constants()
        for name, address in library.addresses.items():
            if name in Frame.__members__:
                self._frame[Frame[name]] = address
        self._logits = np.empty((0, 0), np.float32)
        helpers = [self._start_helper(rank) for rank in range(1, threads)]
        weakref.finalize(self, _dismiss, self._control, helpers, (self._frame, library)).atexit = False

    def run(self, plan: StepPlan, kv: PagedKV) -> Floats:
        """float32 [rows that sample, vocabulary], overwritten by the next step."""
        self._reserve(len(plan.tokens), len(plan.sampled_rows), plan.longest_context)
        self._place(plan)
        self._frame[Frame.KV], self._frame[Frame.KV_BLOCK_BYTES] = kv.storage.data_ptr(), kv.block_bytes
        self._function(0, self._threads, self._control.ctypes.data, self._frame.ctypes.data)
        return self._logits[: len(plan.sampled_rows), : self._config.vocabulary_size]

    def _start_helper(self, rank: int) -> threading.Thread:
        arguments = (rank, self._threads, self._control.ctypes.data, self._frame.ctypes.data)
        helper = threading.Thread(target=self._function, args=arguments, name=f"kernel-{rank}", daemon=True)
        helper.start()
        return helper

    def _place(self, plan: StepPlan) -> None:
        frame, rows, sampled = self._frame, len(plan.tokens), len(plan.sampled_rows)
        isa, bits = self._isa, self._shape.weight_bits
        height = tile_rows(isa, bits, rows)
        frame[Frame.ROWS], frame[Frame.TILE_ROWS] = rows, height
        frame[Frame.GROUPS] = groups = tile_groups(isa, bits, -(-rows // height), self._threads)
        helping = groups == 1 < self._threads and rows <= self._apart.rows
        self._use(self._apart if helping else self._shared)
        frame[Frame.SLICES] = len(plan.first_rows) - 1
        frame[Frame.SAMPLED], frame[Frame.SAMPLED_TILE_ROWS] = (
            sampled,
            tile_rows(self._isa, self._shape.head_bits, max(sampled, 1)),
        )
        numbers, starts = [*plan.tokens], [0]
        for values in (plan.positions, plan.row_blocks, plan.first_rows, plan.table_starts, plan.sampled_rows):
            starts.append(len(numbers))
            numbers += values
        if len(numbers) > len(self._numbers) or len(plan.tables) > len(self._tables):
            self._numbers = np.empty(_room(len(numbers), len(self._numbers)), np.int64)
            self._tables = np.empty(_room(len(plan.tables), len(self._tables)), np.int32)
            self._numbers_at = self._numbers.ctypes.data
            self._frame[Frame.TABLES] = self._tables.ctypes.data
        self._numbers[: len(numbers)] = numbers
        self._tables[: len(plan.tables)] = plan.tables
        for field, start in zip(_NUMBERS, starts, strict=True):
            frame[field] = self._numbers_at + 8 * start

    def _use(self, places: Places) -> None:
        if places is not self._places:
            self._places = places
            for field, value in places.fields.items():
                self._frame[field] = value

    def _keep(self, field: Frame, array: npt.NDArray[np.generic]) -> None:
        self._kept[field] = array
        self._frame[field] = array.ctypes.data

    def _set_constants(self) -> None:
        weights, config = self._weights, self._config
        linears = np.zeros((len(weights.linears), 3), np.int64)
        for row, linear, bias in zip(linears, weights.linears, weights.biases, strict=True):
            row[:] = linear.words.ctypes.data, linear.scales.ctypes.data, 0 if bias is None else bias.ctypes.data
        self._keep(Frame.LINEARS, linears)
        self._keep(Frame.EMBEDDING, weights.embedding)
        self._keep(Frame.NORMS, weights.norms)
        self._keep(Frame.QK_NORMS, weights.qk_norms)
        windows = [NO_WINDOW if window is None else window for window in config.windows]
        self._keep(Frame.WINDOWS, np.array(windows, np.int64))
        size = -(-scratch_bytes(self._isa, self._shape) // 64) * 64
        self._keep(Frame.SCRATCH, aligned_zeros((self._threads, size), np.uint8))
        self._frame[Frame.SCRATCH_BYTES] = size

    def _reserve(self, rows: int, sampled: int, context: int) -> None:
        """Makes room for a step of this size."""
        if rows > self._shared.rows:
            self._shared = Places.shared(self._isa, self._shape, _room(rows, self._shared.rows))
        if sampled > self._sampled:
            self._sampled = _room(sampled, self._sampled)
            width = padded_columns(self._shape.vocabulary, self._isa)
            self._logits = aligned_zeros((self._sampled + TALLEST, width), np.float32)
            self._keep(Frame.LOGITS, self._logits)
        if context > self._context:
            self._context = min(_room(context, max(self._context, _FEWEST_POSITIONS)), self._config.max_context_tokens)
            self._reserve_context(self._context)

    def _reserve_context(self, context: int) -> None:
        angles = torch.arange(context)[:, None].float() * self._frequencies
        self._keep(Frame.COS, angles.cos().numpy())
        self._keep(Frame.SIN, angles.sin().numpy())


def _numerics(isa: Isa) -> str:
    """What decides how sums are rounded: the kernels add each row's products in one order, whatever else is computed
    with them, but the compiler and the processor choose the instructions, and torch computes the rotary angles and
    transforms 8-bit weights.
    """
    versions = f"kernels {sources_digest()}, numba {numba.__version__}, torch {torch.__version__}"
    return f"{isa.name}, {llvm.get_host_cpu_name()}, {versions}"


def _dismiss(control: npt.NDArray[np.int64], helpers: list[threading.Thread], _: object) -> None:
    """Ends the helpers, which need all of the arguments until they are gone."""
    stop(control.ctypes.data, len(helpers) + 1)
    for helper in helpers:
        helper.join()


def _room(needed: int, present: int) -> int:
    """At least doubled when it does not suffice, so that it seldom has to be."""
    return present if needed <= present else max(needed, 2 * present)


def load_compiled_llama(
    folder: Path,
    config: LlamaConfig,
    isa: Isa,
    dtype: torch.dtype,
    quantize: Quantization,
    *,
    block_size: int,
    threads: int,
    kernels: Path | None,
) -> CompiledLlama:
    """Reads the checkpoint while the kernels are compiled, or loaded from the folder `kernels`."""
    shape = _shape(config, isa, dtype, quantize, block_size)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="compiler") as compiler:
        library = compiler.submit(kept_library, lambda: compile_apart(isa, shape), f"{isa} {shape}", kernels)
        weights = read_packed_weights(folder, config, isa, dtype, quantize)
        return CompiledLlama(
            config, weights, isa, shape, library.result(), dtype=dtype, quantize=quantize, threads=threads
        )


def _shape(config: LlamaConfig, isa: Isa, dtype: torch.dtype, quantize: Quantization, block_size: int) -> Shape:
    of_layers, of_head = weight_bits(dtype, quantize)
    return Shape(
        layers=config.layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocabulary_size,
        eps=config.norm_eps,
        qk_norm=config.qk_norm,
        block_size=block_size,
        weight_bits=of_layers,
        head_bits=of_head,
        kv_bits=8 * dtype.itemsize,
        embedding_bits=8 * dtype.itemsize,
    )
