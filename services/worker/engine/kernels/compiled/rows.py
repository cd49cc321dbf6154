"""What is done to one row of activations at a time: norms, rotation, SwiGLU.

Plain loops over float32, which LLVM turns into vector code. Sums are reassociated, always in the same way.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import float32, int32, njit

from services.worker.engine.kernels.compiled.machine import float_bits, float_of_bits
from services.worker.engine.kernels.compiled.vectors import LOG2_E

Floats = npt.NDArray[np.float32]

_LOG2_E = float32(LOG2_E)
_LN2_HIGH, _LN2_LOW = float32(0.693359375), float32(-2.12194440e-4)  # Cephes' expf splits ln 2 in two
_LEAST, _MOST = float32(-87.0), float32(88.0)  # beyond, the exponent of e ** x leaves the range

_FAST = {"reassoc", "contract", "nsz", "arcp"}  # NaN and infinity stay what they are


@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def exp(x: float) -> float:
    """e ** x, x being cut to -87..88, within 2 units in the last place; Cephes' expf. exp(0) is 1 exactly."""
    x = x if x > _LEAST else _LEAST
    x = x if x < _MOST else _MOST
    power = np.floor(x * _LOG2_E + float32(0.5))
    r = x - power * _LN2_HIGH - power * _LN2_LOW
    p = float32(1.9875691500e-4)
    p = p * r + float32(1.3981999507e-3)
    p = p * r + float32(8.3334519073e-3)
    p = p * r + float32(4.1665795894e-2)
    p = p * r + float32(1.6666665459e-1)
    p = p * r + float32(5.0000001201e-1)
    p = p * r * r + r + float32(1.0)
    return p * float_of_bits((int32(power) + int32(127)) << int32(23))


@njit(nogil=True, error_model="numpy")
def copy(x: Floats, out: Floats) -> None:
    """out = x, in other memory. numba's own assignment asks whether they overlap, and then copies one by one."""
    for i in range(len(x)):
        out[i] = x[i]


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def add(x: Floats, y: Floats, out: Floats) -> None:
    """out = x + y, in other memory than both: LLVM's vector code is for arrays that do not overlap."""
    for i in range(len(x)):
        out[i] = x[i] + y[i]


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def add_to(total: Floats, x: Floats) -> None:
    """total += x."""
    for i in range(len(x)):
        total[i] += x[i]


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def norm(x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """out = x / rms(x) * weight, over len(x); out may be x. Zhang & Sennrich 2019."""
    squares = float32(0.0)
    for i in range(len(x)):
        squares += x[i] * x[i]
    scale = float32(1.0) / np.sqrt(squares / float32(len(x)) + float32(eps))
    for i in range(len(x)):
        out[i] = x[i] * scale * weight[i]


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def rotate(x: Floats, cos: Floats, sin: Floats) -> None:
    """Rotary embedding in place; element i goes with i + len(x) / 2. cos and sin: len(x) / 2. Su et al. 2021."""
    half = len(cos)
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i] = a * cos[i] - b * sin[i]
        x[i + half] = b * cos[i] + a * sin[i]


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def swiglu(gate: Floats, up: Floats, out: Floats) -> None:
    """out = silu(gate) * up. Shazeer 2020."""
    for i in range(len(out)):
        out[i] = gate[i] / (float32(1.0) + exp(-gate[i])) * up[i]


@njit(nogil=True, error_model="numpy")
def bfloat16_bits(x: float) -> Any:
    """The nearest bfloat16 as uint16, ties to even; NaN stays NaN."""
    if x != x:
        return np.uint16(0x7FC0)
    bits = float_bits(x)
    return np.uint16(((bits + int32(0x7FFF) + ((bits >> int32(16)) & int32(1))) >> int32(16)) & int32(0xFFFF))
