"""Hadamard's transform of k, which leaves products as they are: W x = (W R^T)(R x), R being orthogonal.

A few activations are far larger than all others of their row. Transformed, they are spread over the whole of it, so
that 8 bits and one scale do for a row of activations, and for a column of weights: QuaRot, Ashkboos et al. 2024. R is
the Kronecker product of Hadamard's matrix (Sylvester's construction), for the depth's power of two, and of a cosine
transform (DCT-II) for its odd factor.
"""

import math
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from services.worker.engine.kernels.compiled.vectors import (
    F32,
    I32,
    I64,
    Builder,
    Value,
    at,
    constant,
    load,
    load_splat,
    multiply_add,
    pointer,
    vector,
)

_LANES = 16  # of Hadamard's matrix, that are transformed as one vector
_WIDE = 2 * _LANES  # float32 that are mixed together
_FACTOR = 64  # of Hadamard's matrix, that weights are multiplied with at once


def transformed(x: Tensor) -> Tensor:
    """R x, for each last dimension of a floating-point tensor: a multiple of 32."""
    odd, power = _factors(x.shape[-1])
    return _apply(_mixing(odd, power), x)


def transformed_back(x: Tensor) -> Tensor:
    """R^T x, likewise: what `transformed` was given."""
    odd, power = _factors(x.shape[-1])
    return _apply(_mixing(odd, power).T, x)  # Hadamard's matrix is its own transpose


def _apply(mixing: Tensor, x: Tensor) -> Tensor:
    odd, power = _factors(x.shape[-1])
    done = min(_FACTOR, power)
    y = x.reshape(-1, done) @ _hadamard(done).to(x.dtype)
    while done < power:
        size = min(_FACTOR, power // done)
        y = _hadamard(size).to(x.dtype) @ y.view(-1, size, done)
        done *= size
    return (mixing.to(x.dtype) @ y.view(-1, odd, power)).reshape(x.shape)


@cache
def make_transform(depth: int) -> Any:
    """`transform(x, temp, out)`: out = R x, of `depth` float32 at an address; `temp` has room for as many."""
    odd, power = _factors(depth)
    mix, vectors = _mix(odd, power), power // _LANES

    @njit(nogil=True, error_model="numpy")
    def transform(x: int, temp: int, out: int) -> None:
        for block in range(odd):
            source, to = x + 4 * power * block, temp + 4 * power * block
            for n in range(vectors):
                _transform_lanes(source + 4 * _LANES * n, to + 4 * _LANES * n)
            apart = 1
            while apart < vectors:
                for first in range(0, vectors, 2 * apart):
                    for n in range(first, first + apart):
                        _add_and_subtract(to + 4 * _LANES * n, to + 4 * _LANES * (n + apart))
                apart *= 2
        mix(temp, out)

    return transform


def _factors(depth: int) -> tuple[int, int]:
    """Its odd factor and its power of two."""
    power = depth & -depth
    if power < _WIDE:
        raise ValueError(f"{depth} is no multiple of {_WIDE}")
    return depth // power, power


@cache
def _hadamard(size: int) -> Tensor:
    """[size, size] of 1 and -1, in the order of Sylvester's construction."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


@cache
def _mixing(odd: int, power: int) -> Tensor:
    """float64 [odd, odd]: the orthonormal DCT-II, by what Hadamard's matrix of `power` lacks to be orthonormal."""
    n = torch.arange(odd, dtype=torch.float64)
    matrix = torch.cos(math.pi / odd * (n + 0.5) * n[:, None]) * math.sqrt(2 / odd)
    matrix[0] /= math.sqrt(2)
    return matrix / math.sqrt(power)


@intrinsic
def _transform_lanes(_: Any, x: Any, out: Any) -> Any:
    """out = Hadamard's matrix of _LANES by as many float32."""

    def generate(context: Any, builder: Builder, __: Any, arguments: Any) -> Value:
        x, out = (pointer(builder, address) for address in arguments)
        y = load(builder, x, F32, _LANES)
        apart = 1
        while apart < _LANES:
            partners = ir.Constant(vector(I32, _LANES), [lane ^ apart for lane in range(_LANES)])
            signs = ir.Constant(vector(F32, _LANES), [-1.0 if lane & apart else 1.0 for lane in range(_LANES)])
            y = multiply_add(builder, y, signs, builder.shuffle_vector(y, y, partners))
            apart *= 2
        builder.store(y, out, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _add_and_subtract(_: Any, a: Any, b: Any) -> Any:
    """_LANES float32 at each address become their sum and their difference."""

    def generate(context: Any, builder: Builder, __: Any, arguments: Any) -> Value:
        places = [pointer(builder, address) for address in arguments]
        a, b = (load(builder, place, F32, _LANES) for place in places)
        for value, place in zip((builder.fadd(a, b), builder.fsub(a, b)), places, strict=True):
            builder.store(value, place, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _mix(odd: int, power: int) -> Any:
    """Intrinsic (x, out): out = mixing matrix by x, both [odd, power] float32."""
    numbers = [float(number) for number in _mixing(odd, power).flatten()]

    @intrinsic
    def mix(_: Any, x: Any, out: Any) -> Any:
        def generate(context: Any, builder: Builder, __: Any, arguments: Any) -> Value:
            x, out = (pointer(builder, address) for address in arguments)
            matrix = cgutils.global_constant(builder, "mixing", ir.Constant(ir.ArrayType(F32, len(numbers)), numbers))
            with cgutils.for_range(builder, I64(power // _WIDE), intp=I64) as run:
                column = builder.mul(run.index, I64(4 * _WIDE))
                with cgutils.for_range(builder, I64(odd), intp=I64) as row:
                    total = cgutils.alloca_once(builder, vector(F32, _WIDE))
                    builder.store(constant(F32, _WIDE, 0.0), total)
                    factors = at(builder, matrix, builder.mul(row.index, I64(4 * odd)))
                    with cgutils.for_range(builder, I64(odd), intp=I64) as term:
                        factor = at(builder, factors, builder.mul(term.index, I64(4)))
                        place = builder.add(column, builder.mul(term.index, I64(4 * power)))
                        terms = load(builder, at(builder, x, place), F32, _WIDE)
                        product = multiply_add(
                            builder, terms, load_splat(builder, factor, F32, _WIDE), builder.load(total)
                        )
                        builder.store(product, total)
                    place = builder.add(column, builder.mul(row.index, I64(4 * power)))
                    builder.store(builder.load(total), at(builder, out, place), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return mix
