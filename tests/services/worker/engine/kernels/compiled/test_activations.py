"""How rows of activations are rounded and laid out for tiles, against torch and numpy."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.kernels.compiled.activations import (
    make_put,
    put_floats,
    put_groups,
    put_matrix,
    put_pairs,
    put_scratch,
)
from services.worker.engine.kernels.compiled.hadamard import transformed
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.tiles import GROUP, RUN_BYTES
from tests.services.worker.engine.kernels.compiled.calling import ISA
from tests.services.worker.engine.kernels.compiled.test_rows import Floats, randoms, seeds, unhurried

ISAS = [replace(ISA, matrices=matrices) for matrices in (True, False)]  # both layouts, which any machine can write


@pytest.mark.parametrize("height", [1, 3, 12])
@pytest.mark.parametrize("row", [0, 2, 14])
def test_put_floats_lays_a_row_beside_others_of_its_tile(row: int, height: int) -> None:
    depth, tiles = 80, 15
    values = randoms(48)
    x = np.zeros((tiles, depth, height), np.float32)
    expected = x.copy()
    put_floats(values.ctypes.data, 48, 32, row, height, depth, x.ctypes.data, 0, 0)
    expected[row // height, 32:, row % height] = values
    assert np.array_equal(x, expected)


@pytest.mark.parametrize("height", [1, 3, 12])
@pytest.mark.parametrize("row", [0, 2, 14])
def test_put_pairs_lays_a_row_beside_others_of_its_tile(row: int, height: int) -> None:
    depth, tiles, first = 80, 15, 32
    values = randoms(48)
    x = np.zeros((tiles, depth // 2, height, 2), np.uint16)
    expected = x.copy()
    put_pairs(values.ctypes.data, 48, first, row, height, depth, x.ctypes.data, 0, 0)
    rounded = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    expected[row // height, first // 2 :, row % height] = rounded.reshape(-1, 2)
    assert np.array_equal(x, expected)


@pytest.mark.parametrize("height", [1, 3, 16])
@pytest.mark.parametrize("row", [0, 2, 18])
def test_put_matrix_lays_a_row_in_runs_beside_those_of_its_tile(row: int, height: int) -> None:
    runs, tiles, first = 3, 19, 16
    values = randoms(64)
    x = np.zeros((tiles, runs, height, GROUP), np.uint16)
    expected = x.copy()
    put_matrix(values.ctypes.data, 64, first, row, height, runs * GROUP, x.ctypes.data, 0, 0)
    rounded = np.zeros(runs * GROUP, np.uint16)
    rounded[first : first + 64] = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    expected[row // height, :, row % height] = rounded.reshape(runs, GROUP)
    assert np.array_equal(x, expected)


@pytest.mark.parametrize("height", [1, 2])
def test_put_pairs_rounds_ties_to_even_and_keeps_infinity_and_nan(height: int) -> None:
    values = np.zeros(16, np.float32)
    values[:6] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), np.inf, -np.inf, np.nan
    x = np.zeros((8, height, 2), np.uint16)
    put_pairs(values.ctypes.data, 16, 0, 0, height, 16, x.ctypes.data, 0, 0)
    ours = torch.from_numpy(x[:, 0].reshape(-1).copy()).view(torch.bfloat16).float()
    assert ours[:5].tolist() == [1.0, 1 + 2.0**-6, -1.0, np.inf, -np.inf]
    assert ours[5].isnan()
    assert not ours[6:].any()


@pytest.mark.parametrize("height", [1, 3, 12])
@pytest.mark.parametrize("row", [0, 2, 14])
def test_put_groups_lays_a_row_beside_others_of_its_tile(row: int, height: int) -> None:
    tiles, groups, first = 15, 4, 1
    values = randoms(2 * GROUP, scale=7.0)
    x = np.zeros((tiles, groups * GROUP // 4, height, 4), np.int8)
    scales, sums = np.zeros((tiles, groups, height), np.float32), np.zeros((tiles, groups, height), np.int32)
    parts = (x, scales, sums)
    expected = [part.copy() for part in parts]
    addresses = [part.ctypes.data for part in parts]
    put_groups(values.ctypes.data, 2 * GROUP, first * GROUP, row, height, groups * GROUP, *addresses)
    tile, within = row // height, row % height
    numbers, scale = quantized(values, GROUP)
    expected[0][tile, first * GROUP // 4 : (first + 2) * GROUP // 4, within] = numbers.reshape(-1, 4)
    expected[1][tile, first : first + 2, within] = scale
    expected[2][tile, first : first + 2, within] = numbers.reshape(2, -1).sum(1)
    for ours, theirs in zip(parts, expected, strict=True):
        assert np.array_equal(ours, theirs)


@unhurried
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=GROUP, max_size=GROUP), seeds)
def test_put_groups_rounds_to_the_nearest_127th_of_the_largest(values: list[float], seed: int) -> None:
    group = np.array(values, np.float32)
    if seed % 2:  # many equal and tied numbers
        group = np.round(group) * np.float32(0.5)
    numbers, scale, total = put_group(group)
    expected, expected_scale = quantized(group, GROUP)
    assert scale == expected_scale[0]
    assert np.array_equal(numbers, expected)
    assert total == numbers.sum()


def test_put_groups_ties_to_even() -> None:
    group = np.zeros(GROUP, np.float32)
    group[:6] = 127, 0.5, 1.5, 2.5, -0.5, -1.5
    assert put_group(group)[0][:6].tolist() == [127, 0, 2, 2, 0, -2]


def test_put_groups_of_zeros_and_of_nan() -> None:
    numbers, scale, total = put_group(np.zeros(GROUP, np.float32))
    assert (numbers.any(), scale, total) == (False, 0.0, 0)
    assert np.isnan(put_group(np.full(GROUP, np.nan, np.float32))[1])


def put_group(group: Floats) -> tuple[npt.NDArray[np.int8], float, int]:
    """One group's bytes, scale and sum, from the kernel."""
    numbers, scale, total = np.zeros(GROUP, np.int8), np.zeros(1, np.float32), np.zeros(1, np.int32)
    addresses = [part.ctypes.data for part in (numbers, scale, total)]
    put_groups(group.ctypes.data, GROUP, 0, 0, 1, GROUP, *addresses)
    return numbers, float(scale[0]), int(total[0])


@pytest.mark.parametrize("height", [1, 3, 12])
@pytest.mark.parametrize("row", [0, 2, 14])
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_for_8_bits_is_transformed_and_quantized_as_a_whole(isa: Isa, row: int, height: int) -> None:
    tiles, depth, deep = 15, 96, 128
    values, scratch = randoms(depth, scale=7.0), np.full(depth + put_scratch(8, depth), np.nan, np.float32)
    scratch[:depth] = values
    x = np.zeros(
        (tiles, deep // RUN_BYTES, height, RUN_BYTES) if isa.matrices else (tiles, deep // 4, height, 4), np.int8
    )
    scales, sums = np.zeros(tiles * height, np.float32), np.zeros(tiles * height, np.int32)
    expected = [part.copy() for part in (x, scales, sums)]
    row_putter(isa, depth)(
        scratch.ctypes.data, depth, 0, row, height, depth, x.ctypes.data, scales.ctypes.data, sums.ctypes.data
    )
    numbers, scale = quantized(transformed(torch.from_numpy(values)).numpy(), depth)
    whole = np.concatenate((numbers, np.zeros(deep - depth, np.int8)))
    expected[0][row // height, :, row % height] = whole.reshape(-1, x.shape[-1])
    expected[1][row] = scale[0]
    # The transform adds in another order than torch.
    np.testing.assert_allclose(scales, expected[1], rtol=1e-6)
    assert np.abs(x.astype(np.int32) - expected[0]).max() <= 1
    assert (x != expected[0]).sum() <= 1
    expected[2][row] = np.sum(x, dtype=np.int32)
    assert np.array_equal(sums, expected[2])


def test_a_row_for_8_bits_whose_sums_overflow_has_no_finite_scale() -> None:
    scratch = np.full(64 + put_scratch(8, 64), 3e38, np.float32)
    numbers, scales, sums = np.ones(64, np.int8), np.ones(1, np.float32), np.ones(1, np.int32)
    row_putter(ISA, 64)(scratch.ctypes.data, 64, 0, 0, 1, 64, numbers.ctypes.data, scales.ctypes.data, sums.ctypes.data)
    assert not np.isfinite(scales[0])


@pytest.mark.parametrize("depth", [32, 64, 96])
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_row_for_8_bits_of_zeros_or_not_finite(value: float, depth: int) -> None:
    scratch = np.zeros(depth + put_scratch(8, depth), np.float32)
    scratch[5] = value
    numbers, scales, sums = np.ones(128, np.int8), np.ones(1, np.float32), np.ones(1, np.int32)
    row_putter(ISA, depth)(
        scratch.ctypes.data, depth, 0, 0, 1, depth, numbers.ctypes.data, scales.ctypes.data, sums.ctypes.data
    )
    assert np.array_equal(scales, [0.0 if value == 0 else np.nan], equal_nan=True)
    assert value != 0 or not (numbers[:64].any() or sums.any())


@cache
def row_putter(isa: Isa, depth: int) -> Callable[..., None]:
    put: Callable[..., None] = make_put(isa, 8, depth)
    return put


def quantized(values: Floats, group: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """Signed bytes of whole groups, ties to even, and each group's scale."""
    groups = values.reshape(-1, group)
    largest = np.abs(groups).max(1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    numbers = np.rint(groups * inverse[:, None]).astype(np.int8)
    return numbers.reshape(-1), largest / np.float32(127)
