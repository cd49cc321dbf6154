"""What is done to single rows, against torch."""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from services.worker.engine.kernels.compiled import rows

Floats = npt.NDArray[np.float32]

# numba compiles each kernel at its first call.
unhurried = settings(max_examples=50, deadline=None)
sizes = st.integers(1, 300)
seeds = st.integers(0, 2**32 - 1)
any_float32 = st.floats(width=32)

exp, bfloat16_bits = rows.exp, rows.bfloat16_bits


@njit(error_model="numpy")
def exponentials(x: Floats) -> Floats:
    out = np.empty_like(x)
    for i in range(len(x)):
        out[i] = exp(x[i])
    return out


@njit(error_model="numpy")
def rounded(x: Floats) -> npt.NDArray[np.uint16]:
    out = np.empty(len(x), np.uint16)
    for i in range(len(x)):
        out[i] = bfloat16_bits(x[i])
    return out


def randoms(*shape: int, seed: int = 0, scale: float = 1.0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)


def ulps_apart(ours: Floats, exact: npt.NDArray[np.float64]) -> float:
    return float(np.max(np.abs(ours - exact) / np.spacing(np.abs(exact).astype(np.float32))))


def assert_close(ours: Floats, expected: torch.Tensor, *, rtol: float = 2e-6, atol: float = 1e-6) -> None:
    torch.testing.assert_close(torch.from_numpy(ours), expected, rtol=rtol, atol=atol)


def test_exp_is_within_two_units_in_the_last_place() -> None:
    x = np.linspace(-87, 88, 1_000_001, dtype=np.float32)
    assert ulps_apart(exponentials(x), np.exp(x.astype(np.float64))) <= 2


def test_exp_at_its_ends() -> None:
    x = np.array([0.0, -0.0, 88.5, 1e4, np.inf, -87.5, -1e4, -np.inf, np.nan], np.float32)
    results = exponentials(x)
    assert results[:2].tolist() == [1.0, 1.0]
    assert np.isfinite(results).all()
    assert set(results[2:5]) == set(exponentials(np.array([88], np.float32)))
    # NaN counts as the least: whoever weighs by it divides by a sum or multiplies with the NaN itself.
    assert set(results[5:]) == set(exponentials(np.array([-87], np.float32)))
    assert results[5] < 2e-38


@unhurried
@given(sizes, seeds)
def test_add(size: int, seed: int) -> None:
    x, y = randoms(2, size, seed=seed)
    total, out = x + y, np.empty_like(x)
    rows.add(x, y, out)
    assert np.array_equal(out, total)
    rows.add_to(x, y)
    assert np.array_equal(x, total)


@unhurried
@given(sizes, seeds, st.sampled_from([1e-3, 1.0, 1e3]))
def test_norm(size: int, seed: int, scale: float) -> None:
    x, weight = randoms(2, size, seed=seed, scale=scale)
    expected = F.rms_norm(torch.from_numpy(x.copy()), (size,), torch.from_numpy(weight), 1e-6)
    out = np.empty_like(x)
    rows.norm(x, weight, 1e-6, out)
    assert_close(out, expected, atol=1e-6 * max(1, scale))
    rows.norm(x, weight, 1e-6, x)
    assert np.array_equal(x, out)


def test_norms_of_zeros_and_of_nan() -> None:
    zeros, nan, weight, out = np.zeros(40, np.float32), randoms(40), randoms(40), np.empty(40, np.float32)
    rows.norm(zeros, weight, 1e-6, out)
    assert not out.any()
    nan[3] = np.nan
    rows.norm(nan, weight, 1e-6, out)
    assert np.isnan(out).all()


@unhurried
@given(st.integers(1, 100), seeds)
def test_rotate(half: int, seed: int) -> None:
    x = randoms(2 * half, seed=seed)
    angles = torch.from_numpy(randoms(half, seed=seed + 1, scale=10.0))
    cos, sin = angles.cos(), angles.sin()
    first, second = torch.from_numpy(x.copy()).chunk(2)
    rows.rotate(x, cos.numpy(), sin.numpy())
    assert_close(x, torch.cat((first * cos - second * sin, second * cos + first * sin)))


@unhurried
@given(sizes, seeds, st.sampled_from([1.0, 30.0, 1e4]))
def test_swiglu(size: int, seed: int, scale: float) -> None:
    gate, up = randoms(2, size, seed=seed, scale=scale)
    out = np.empty_like(gate)
    rows.swiglu(gate, up, out)
    assert_close(out, F.silu(torch.from_numpy(gate)) * torch.from_numpy(up))


def test_swiglu_hands_nan_on() -> None:
    gate, up, out = np.ones(20, np.float32), np.ones(20, np.float32), np.empty(20, np.float32)
    gate[3], up[5] = np.nan, np.nan
    rows.swiglu(gate, up, out)
    assert np.flatnonzero(np.isnan(out)).tolist() == [3, 5]


@unhurried
@given(st.lists(any_float32, min_size=1, max_size=20))
def test_bfloat16_bits_of_any_float32(values: list[float]) -> None:
    x = np.array(values, np.float32)
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(x).to(torch.bfloat16)
    ours = torch.from_numpy(rounded(x)).view(torch.bfloat16)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours[~ours.isnan()].view(torch.int16), expected[~expected.isnan()].view(torch.int16))


def test_bfloat16_bits_at_ties_and_ends() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000])
    x = bits.astype(np.uint32).view(np.float32)
    # A tie goes to the even neighbour; the largest finite number to infinity.
    assert rounded(x).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF82, 0x7F80, 0x7F80, 0xFF80]
    assert rounded(np.array([np.nan, -0.0], np.float32)).tolist() == [0x7FC0, 0x8000]
