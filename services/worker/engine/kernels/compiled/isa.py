"""What the machine's instruction set means for the kernels: how wide a vector is, how many fit in registers."""

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from typing import Literal

IsaName = Literal["amx", "avx512_bf16", "avx512", "avx2", "baseline"]

_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
# Best first.
_NEEDS: dict[IsaName, tuple[str, ...]] = {
    "amx": (*_AVX512, "avx512bf16", "amx-tile", "amx-bf16", "amx-int8"),
    "avx512_bf16": (*_AVX512, "avx512bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "baseline": (),
}
_ARCH_PRCTL = 158  # the system call's number
_REQUEST_PERMISSION, _TILE_DATA = 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA


@dataclass(frozen=True, slots=True)
class Isa:
    """One level of instruction sets. The same kernels are made for each, from these facts alone."""

    name: IsaName
    lanes: int  # float32 in a vector
    accumulators: int  # vectors that a tile may keep in registers, beside its operands
    vnni: bool  # whether one instruction multiplies 4 bytes per lane and adds them up
    byte_pairs: bool  # whether, without that, one multiplies 4 unsigned by 4 signed bytes and adds them up in pairs
    bfloat16_dots: bool  # whether one instruction multiplies 2 bfloat16 per lane and adds them up
    matrices: bool = False  # whether one multiplies 16 rows of 32 bfloat16, or 64 bytes, by 16 columns

    @property
    def panel_columns(self) -> int:
        """Columns of a panel of packed weights: two vectors."""
        return 2 * self.lanes

    def activation_bits(self, weight_bits: int) -> int:
        """What activations are rounded to before they meet weights of so many bits: 32 leaves them as they are."""
        if weight_bits in (4, 8):
            return 8
        return 16 if weight_bits == 16 and self.bfloat16_dots else 32

    def uses_matrices(self, weight_bits: int) -> bool:
        """Whether activations meet weights of so many bits as whole matrices."""
        return self.matrices and weight_bits in (8, 16)


def has_bfloat16() -> bool:
    """Whether this processor rounds to bfloat16 by an instruction."""
    import llvmlite.binding as llvm

    return bool(llvm.get_host_cpu_features().get("avx512bf16"))


def choose_isa(name: Literal["auto"] | IsaName = "auto") -> Isa:
    """The best that this machine has, or a lesser one. ValueError if it has not the one named.

    numba compiles for one kind of processor per process, and settles it when the first function to compile is defined.
    So this is to be called before the other modules of this package are imported, and always with the same name.
    """
    import llvmlite.binding as llvm  # slow to import, and not needed for the types alone
    import numba

    features = llvm.get_host_cpu_features()
    present = [level for level, needed in _NEEDS.items() if all(features.get(feature) for feature in needed)]
    if "amx" in present and name in ("auto", "amx") and not may_use_matrices():
        if name == "amx":
            raise ValueError("the system grants no room for the registers of amx")
        present.remove("amx")
    if name == "auto":
        name = present[0]
    if name not in present:
        raise ValueError(f"this processor ({llvm.get_host_cpu_name()}) has no {name}")
    if name in ("amx", "avx512_bf16", "avx512"):
        return Isa(
            name,
            lanes=16,
            accumulators=24,
            vnni=bool(features.get("avx512vnni")),
            byte_pairs=False,
            bfloat16_dots=name != "avx512",
            matrices=name == "amx",
        )
    if "avx512" in present or name == "baseline":
        # Without this, code for the lesser level would still use what the better one has.
        numba.config.CPU_NAME, numba.config.CPU_FEATURES = ("haswell" if name == "avx2" else "x86-64"), ""
    if name == "avx2":
        return Isa("avx2", lanes=8, accumulators=12, vnni=False, byte_pairs=True, bfloat16_dots=False)
    return Isa("baseline", lanes=4, accumulators=12, vnni=False, byte_pairs=False, bfloat16_dots=False)


@cache
def may_use_matrices() -> bool:
    """Asks the system for room for AMX's registers, which it gives a process only then. False if it does not."""
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0
