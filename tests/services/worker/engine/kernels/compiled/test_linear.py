"""Matrix products against exact arithmetic on the same numbers."""

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.worker.engine.kernels.compiled.hadamard import transformed, transformed_back
from services.worker.engine.kernels.compiled.linear import TALLEST, make_linear, tile_rows
from services.worker.engine.kernels.compiled.packing import (
    Arena,
    PackedLinear,
    aligned_zeros,
    pack,
    packed_bytes,
    padded_columns,
    quantize_bytes,
    quantize_nibbles,
    unpack,
)
from services.worker.engine.kernels.compiled.team import new_control
from services.worker.engine.kernels.compiled.tiles import GROUP, RUN_BYTES
from tests.services.worker.engine.kernels.compiled.calling import ISA, compiled

BITS = (32, 16, 8, 4)
HEIGHTS = {bits: sorted({tile_rows(ISA, bits, rows) for rows in range(1, 50)}) for bits in BITS}
ULP = 2.0**-24  # half a unit in the last place of a float32, relative

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Product:
    """Random factors: x [rows, depth], weight [columns, depth], and perhaps a bias."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


def random_product(rows: int, columns: int, depth: int, *, biased: bool = False, seed: int = 0) -> Product:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, depth, generator=generator) * 3
    weight = torch.randn(columns, depth, generator=generator) * 0.2
    return Product(x, weight, torch.randn(columns, generator=generator) if biased else None)


def quantized(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Signed bytes [rows, depth], ties to even, and the scale, a 127th of the largest, of each group of so many k."""
    groups = x.unflatten(1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127.0 / largest, torch.zeros_like(largest))
    return (groups * inverse).round().to(torch.int8).flatten(1), (largest / 127.0).squeeze(-1)


def in_tiles(x: Tensor, height: int) -> Tensor:
    """[rows, n, ...] as [tiles, n, height, ...], missing rows zero."""
    missing = x.new_zeros(-len(x) % height, *x.shape[1:])
    return torch.cat((x, missing)).unflatten(0, (-1, height)).transpose(1, 2).contiguous()


def activations(x: Tensor, bits: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, scales and sums as the kernel reads them."""
    if ISA.activation_bits(bits) == 32:
        return in_tiles(x, height), torch.zeros(1), torch.zeros(1)
    if bits == 8:
        numbers, scales = quantized(x, x.shape[1])
        per_row = [in_tiles(each[:, None], height) for each in (scales[:, 0], numbers.sum(-1, dtype=torch.int32))]
        whole = torch.nn.functional.pad(numbers, (0, -x.shape[1] % RUN_BYTES))
        return in_tiles(whole.unflatten(1, (-1, RUN_BYTES if ISA.matrices else 4)), height), *per_row
    if ISA.uses_matrices(bits):
        runs = x.to(torch.bfloat16).view(torch.int16).unflatten(1, (-1, GROUP))
        return in_tiles(runs, height), torch.zeros(1), torch.zeros(1)
    if ISA.activation_bits(bits) == 16:
        words = x.to(torch.bfloat16).view(torch.int32)
        return in_tiles(words, height), torch.zeros(1), torch.zeros(1)
    numbers, scales = quantized(x, GROUP)
    sums = numbers.unflatten(1, (-1, GROUP)).sum(-1, dtype=torch.int32)
    return in_tiles(numbers.unflatten(1, (-1, 4)), height), in_tiles(scales, height), in_tiles(sums, height)


def packed(weight: Tensor, bits: int) -> PackedLinear:
    return pack(weight, bits, ISA, Arena(packed_bytes(*weight.shape, bits, ISA)))


def multiply(product: Product, weights: PackedLinear, *, height: int, members: int = 1, groups: int = 1) -> Floats:
    """The kernel's product, [rows, columns], by so many threads, which share out so many groups of tiles."""
    rows, columns = len(product.x), len(product.weight)
    width, tiles = padded_columns(columns, ISA), -(-rows // height)
    x, scales, sums = (part.numpy() for part in activations(product.x, weights.bits, height))
    bias = np.zeros(0, np.float32)
    if product.bias is not None:
        bias = np.zeros(width, np.float32)
        bias[:columns] = product.bias.numpy()
    out = aligned_zeros((tiles * height, width), np.float32)
    out[:] = np.nan
    control = new_control(members)
    kernel = compiled(make_linear, weights.bits)

    def work(rank: int = 0) -> None:
        kernel(
            control, members, rank, groups, tiles, height, product.x.shape[1], x, scales, sums, weights.words,
            weights.scales, bias if len(bias) else 0, width // ISA.panel_columns, out, out.strides[0],
            np.zeros(1 << 12, np.float32),
        )  # fmt: skip

    helpers = [threading.Thread(target=work, args=(rank,)) for rank in range(1, members)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    return out[:rows, :columns].copy()  # type: ignore[return-value]


def exact_terms(product: Product, weights: PackedLinear) -> tuple[Tensor, ...]:
    """What is to be summed, in float64: tensors [rows, columns, parts]."""
    columns, depth = product.weight.shape
    if weights.bits in (32, 16):
        weight = unpack(weights, columns, depth).double()
        x = product.x if ISA.activation_bits(weights.bits) == 32 else product.x.to(torch.bfloat16)
        return (x.double()[:, None] * weight,)
    if weights.bits == 8:
        numbers, scales = quantized(product.x, depth)
        bytes_, step = quantize_bytes(transformed(product.weight.double()).float())
        dots = numbers.double() @ (bytes_.double() - 128).T
        return ((dots * scales.double() * step.double())[..., None],)
    numbers, scales = quantized(product.x, GROUP)
    x = numbers.double().unflatten(1, (-1, GROUP))
    nibbles, step, least = quantize_nibbles(product.weight)
    dots = torch.einsum("rgk,cgk->rcg", x, nibbles.double().unflatten(1, (-1, GROUP)))
    shares = x.sum(-1)[:, None] * scales.double()[:, None] * least.double()
    return dots * scales.double()[:, None] * step.double(), shares


def assert_exact(product: Product, weights: PackedLinear, out: Floats) -> None:
    """Within what float32 sums of so many terms may be off."""
    terms = torch.cat(exact_terms(product, weights), dim=-1)
    expected, size = terms.sum(-1), terms.abs().sum(-1)
    if product.bias is not None:
        expected, size = expected + product.bias.double(), size + product.bias.double().abs()
    error = (torch.from_numpy(out).double() - expected).abs()
    assert (error <= (terms.shape[-1] + 4) * ULP * size).all()


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 300),
    groups=st.integers(1, 5),
    biased=st.booleans(),
    members=st.integers(1, 3),
    row_groups=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_of_any_shape(
    bits: int, rows: int, columns: int, groups: int, biased: bool, members: int, row_groups: int, seed: int
) -> None:
    product = random_product(rows, columns, groups * GROUP, biased=biased, seed=seed)
    weights = packed(product.weight, bits)
    out = multiply(
        product, weights, height=tile_rows(ISA, bits, rows), members=members, groups=min(row_groups, members)
    )
    assert_exact(product, weights, out)


@pytest.mark.parametrize(("bits", "height"), [(bits, height) for bits in BITS for height in HEIGHTS[bits]])
def test_tiles_of_each_height(bits: int, height: int) -> None:
    """Full ones and one that is not, over panels that are no multiple of what a tile takes."""
    for columns in (1, 5 * ISA.panel_columns + 1, 7 * ISA.panel_columns):
        product = random_product(3 * height - 1, columns, 3 * GROUP, biased=True)
        weights = packed(product.weight, bits)
        assert_exact(product, weights, multiply(product, weights, height=height))


@pytest.mark.parametrize("bits", BITS)
def test_a_rows_result_does_not_depend_on_the_others(bits: int) -> None:
    product = random_product(40, 5 * ISA.panel_columns + 3, 7 * GROUP, biased=True)
    weights = packed(product.weight, bits)
    alone = np.concatenate(
        [multiply(Product(row[None], product.weight, product.bias), weights, height=1) for row in product.x]
    )
    for rows in range(1, 41):
        together = Product(product.x[:rows], product.weight, product.bias)
        assert np.array_equal(multiply(together, weights, height=tile_rows(ISA, bits, rows)), alone[:rows])
    for height in HEIGHTS[bits]:
        assert np.array_equal(multiply(product, weights, height=height), alone)


@pytest.mark.parametrize("bits", BITS)
def test_a_bias_is_added_once_however_threads_share_the_columns(bits: int) -> None:
    """Its panels may be claimed one by one or together, of all columns or of a thread's part of them."""
    product = random_product(15, 5 * ISA.panel_columns, 32 * GROUP, biased=True)
    weights = packed(product.weight, bits)
    for height in HEIGHTS[bits][:3]:
        expected = multiply(product, weights, height=height)
        for groups in [1, 2] * 25:
            assert np.array_equal(multiply(product, weights, height=height, members=2, groups=groups), expected)


@pytest.mark.parametrize("depth", [160, 1 << 16])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_sums_of_the_largest_bytes_are_exact(rows: int, depth: int) -> None:
    """As far as int32 goes, and where pairs or fours of them could overflow or saturate."""
    signs = torch.tensor([1.0, -1.0, 1.0])
    weight = transformed_back(signs[:, None].expand(3, depth).double()).float()
    x = signs.repeat(6)[:rows, None].expand(rows, depth).contiguous()
    weights = packed(weight, 8)
    bytes_ = torch.from_numpy(weights.words[0, : depth // 4].copy()).view(torch.uint8).unflatten(1, (-1, 4))
    assert [set(bytes_[:, column].flatten().tolist()) for column in range(3)] == [{255}, {1}, {255}]
    out = multiply(Product(x, weight, None), weights, height=tile_rows(ISA, 8, rows))
    torch.testing.assert_close(torch.from_numpy(out), x[:, :1] * signs * depth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_and_weights_of_zeros(bits: int) -> None:
    product = Product(torch.zeros(3, GROUP), torch.zeros(7, GROUP), torch.arange(7.0))
    out = multiply(product, packed(product.weight, bits), height=3)
    assert np.array_equal(out, np.tile(np.arange(7, dtype=np.float32), (3, 1)))


@pytest.mark.parametrize("bits", BITS)
def test_tiles_waste_few_rows(bits: int) -> None:
    assert tile_rows(ISA, bits, 1) == 1
    assert HEIGHTS[bits][-1] <= TALLEST
    for rows in range(1, 200):
        height = tile_rows(ISA, bits, rows)
        assert -rows % height <= rows / 2
