"""Reading memory for its rate alone: whether every byte of it is read."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from services.worker.engine.kernels.compiled.packing import aligned_zeros
from services.worker.engine.kernels.compiled.reading import read_memory


def test_threads_read_all_of_the_memory_once() -> None:
    memory = aligned_zeros((6 * 1024,), np.uint8)
    memory[:] = np.random.default_rng(7).integers(0, 256, len(memory))
    with ThreadPoolExecutor(3) as threads:
        sums = read_memory(memory, threads, 3)
    assert sums == [int(np.bitwise_xor.reduce(share)) for share in memory.view(np.int32).reshape(3, -1)]
