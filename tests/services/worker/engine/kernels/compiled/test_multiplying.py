"""Products for their rate alone: whether each of them is made, and counted once."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from services.worker.engine.kernels.compiled.matrix_tiles import PANEL_COLUMNS, TILE_DEPTH, TILE_ROWS
from services.worker.engine.kernels.compiled.multiplying import MATRIX_TURNS, TURNS, make_products
from tests.services.worker.engine.kernels.compiled.calling import ISA

KINDS = (8, 16, 32) if ISA.bfloat16_dots else (8, 32)


@pytest.mark.parametrize("bits", KINDS)
def test_every_thread_makes_all_products_of_its_turns(bits: int) -> None:
    with ThreadPoolExecutor(2) as threads:
        made = make_products(ISA, bits)(threads, 2)
    if ISA.matrices and bits == 16:
        assert made == 2 * MATRIX_TURNS * 2 * TILE_ROWS * PANEL_COLUMNS * TILE_DEPTH
    else:
        assert made == 2 * TURNS * ISA.accumulators * ISA.lanes * (32 // bits)
