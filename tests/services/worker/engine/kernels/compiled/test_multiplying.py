"""Products for their rate alone: whether each of them is made, and counted once."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from services.worker.engine.kernels.compiled.matrix_tiles import PANEL_COLUMNS, TILE_ROWS
from services.worker.engine.kernels.compiled.multiplying import MATRIX_TURNS, TURNS, make_products
from services.worker.engine.kernels.compiled.tiles import RUN_BYTES
from tests.services.worker.engine.kernels.compiled.calling import ISA

KINDS = (4, 8, 16, 32) if ISA.bfloat16_dots else (4, 8, 32)


@pytest.mark.parametrize("bits", KINDS)
def test_every_thread_makes_all_products_of_its_turns(bits: int) -> None:
    with ThreadPoolExecutor(2) as threads:
        made = make_products(ISA, bits)(threads, 2)
    if ISA.uses_matrices(bits):
        assert made == 2 * MATRIX_TURNS * 2 * TILE_ROWS * PANEL_COLUMNS * RUN_BYTES * 8 // bits
    else:
        assert made == 2 * TURNS * ISA.accumulators * ISA.lanes * (32 // ISA.activation_bits(bits))
