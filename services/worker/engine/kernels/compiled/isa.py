"""What the machine's instruction set means for the kernels: how wide a vector is, how many fit in registers."""

from dataclasses import dataclass
from typing import Literal

IsaName = Literal["avx512", "avx2", "baseline"]

_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
_AVX2 = ("avx2", "fma", "f16c")


@dataclass(frozen=True, slots=True)
class Isa:
    """One level of instruction sets. The same kernels are made for each, from these facts alone."""

    name: IsaName
    lanes: int  # float32 in a vector
    accumulators: int  # vectors that a tile may keep in registers, beside its operands
    vnni: bool  # whether one instruction multiplies 4 bytes per lane and adds them up

    @property
    def panel_columns(self) -> int:
        """Columns of a panel of packed weights: two vectors."""
        return 2 * self.lanes


def choose_isa(name: Literal["auto"] | IsaName = "auto") -> Isa:
    """The best that this machine has, or a lesser one. ValueError if it has not the one named.

    numba compiles for one kind of processor per process, and settles it when the first function to compile is defined.
    So this is to be called before the other modules of this package are imported, and always with the same name.
    """
    import llvmlite.binding as llvm  # slow to import, and not needed for the types alone
    import numba

    features = llvm.get_host_cpu_features()
    has_avx2 = all(features.get(feature) for feature in _AVX2)
    has_avx512 = has_avx2 and all(features.get(feature) for feature in _AVX512)
    if name == "auto":
        name = "avx512" if has_avx512 else "avx2" if has_avx2 else "baseline"
    if (name == "avx512" and not has_avx512) or (name == "avx2" and not has_avx2):
        raise ValueError(f"this processor ({llvm.get_host_cpu_name()}) has no {name}")
    if name == "avx512":
        return Isa("avx512", lanes=16, accumulators=24, vnni=bool(features.get("avx512vnni")))
    if has_avx512 or name == "baseline":
        # Without this, code for the lesser level would still use what the better one has.
        numba.config.CPU_NAME, numba.config.CPU_FEATURES = ("haswell" if name == "avx2" else "x86-64"), ""
    if name == "avx2":
        return Isa("avx2", lanes=8, accumulators=12, vnni=False)
    return Isa("baseline", lanes=4, accumulators=12, vnni=False)
