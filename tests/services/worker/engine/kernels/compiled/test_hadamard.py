"""The transform of k: orthogonal, and the same for weights, in torch, as for activations, compiled."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.worker.engine.kernels.compiled.hadamard import make_transform, transformed, transformed_back

DEPTHS = (32, 64, 96, 160, 512, 576, 896, 1536, 4864, 14336)


def random_rows(rows: int, depth: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, depth, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**31))
def test_products_stay_what_they_are(groups: int, seed: int) -> None:
    depth = 32 * groups
    x, weight = random_rows(3, depth, seed), random_rows(5, depth, seed + 1)
    expected = x.double() @ weight.double().T
    product = transformed(x).double() @ transformed(weight).double().T
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-5 * depth**0.5)


@pytest.mark.parametrize("depth", DEPTHS)
def test_it_is_undone(depth: int) -> None:
    x = random_rows(2, depth)
    torch.testing.assert_close(transformed_back(transformed(x)), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", DEPTHS)
def test_one_large_value_is_spread_over_all(depth: int) -> None:
    for place in (0, 1, depth // 3, depth - 1):
        x = torch.zeros(depth)
        x[place] = 1.0
        assert transformed(x).abs().max() <= (2 / depth) ** 0.5 * 1.001


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_compiled_one_is_the_same(depth: int) -> None:
    x, temp, out = random_rows(1, depth), np.full(depth, np.nan, np.float32), np.full(depth, np.nan, np.float32)
    kept = x.clone()
    make_transform(depth)(x.data_ptr(), temp.ctypes.data, out.ctypes.data)
    torch.testing.assert_close(torch.from_numpy(out), transformed(x)[0], rtol=0, atol=3e-6)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("depth", [1, 16, 48, 100])
def test_depths_of_no_whole_groups_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"^{depth} is no multiple of 32$"):
        transformed(torch.ones(depth))
