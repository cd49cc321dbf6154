"""What numba has no words for: memory at an address, the bits of a number, atomic operations, and C's semaphores."""

from typing import Any

from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from services.worker.engine.kernels.compiled.vectors import (
    F32,
    I32,
    I64,
    Builder,
    Value,
    call,
    fetch_lines,
    pointer,
)

SEMAPHORE_BYTES = 32  # sizeof(sem_t) with glibc and musl on 64-bit machines


def _viewer(element: Any) -> Any:
    @intrinsic
    def as_pointer(_: Any, address: Any) -> Any:
        def generate(_: Any, builder: Builder, __: Any, arguments: Any) -> Value:
            return pointer(builder, arguments[0])

        return types.CPointer(element)(types.int64), generate

    @njit(nogil=True, error_model="numpy")
    def view(address: int, count: int) -> Any:
        return carray(as_pointer(address), (count,))

    return view


# One-dimensional arrays of `count` elements at an address. They own nothing, so that passing them on costs nothing.
floats, halves, longs = (_viewer(element) for element in (types.float32, types.uint16, types.int64))


def _loader(element: Any, numba_type: Any) -> Any:
    @intrinsic
    def read(_: Any, address: Any) -> Any:
        def generate(_: Any, builder: Builder, __: Any, arguments: Any) -> Value:
            return builder.load(pointer(builder, arguments[0]), typ=element)

        return numba_type(types.int64), generate

    return read


def _storer(numba_type: Any) -> Any:
    @intrinsic
    def write(_: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Builder, __: Any, arguments: Any) -> Value:
            builder.store(arguments[1], pointer(builder, arguments[0]))
            return context.get_dummy_value()

        return types.void(types.int64, numba_type), generate

    return write


# Single elements at an address, without the check for a negative index that arrays have.
load_float32, store_float32 = _loader(F32, types.float32), _storer(types.float32)
load_int32, store_int32 = _loader(I32, types.int32), _storer(types.int32)


@intrinsic
def float_bits(_: Any, value: Any) -> Any:
    """The bits of a float32 as an int32."""

    def generate(_: Any, builder: Builder, __: Any, arguments: Any) -> Value:
        return builder.bitcast(arguments[0], I32)

    return types.int32(types.float32), generate


@intrinsic
def float_of_bits(_: Any, bits: Any) -> Any:
    """The float32 of an int32's bits."""

    def generate(_: Any, builder: Builder, __: Any, arguments: Any) -> Value:
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), generate


@intrinsic
def atomic_replace(_: Any, address: Any, old: Any, new: Any) -> Any:
    """Writes `new` to an address if the int64 there is `old`; whether it was."""

    def generate(_: Any, builder: Builder, __: Any, arguments: Any) -> Value:
        address, old, new = arguments
        return builder.extract_value(builder.cmpxchg(pointer(builder, address), old, new, "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), generate


@intrinsic
def atomic_store(_: Any, address: Any, value: Any) -> Any:
    """Writes the int64 at an address after all that was written before."""

    def generate(context: Any, builder: Builder, __: Any, arguments: Any) -> Value:
        place = builder.inttoptr(arguments[0], I64.as_pointer())
        builder.store_atomic(arguments[1], place, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def atomic_load(_: Any, address: Any) -> Any:
    """The int64 at an address, as the last thread wrote it."""

    def generate(_: Any, builder: Builder, __: Any, arguments: Any) -> Value:
        return builder.load_atomic(pointer(builder, arguments[0]), "seq_cst", 8, typ=I64)

    return types.int64(types.int64), generate


def fetching(size: int) -> Any:
    """Intrinsic (address): has so many bytes come to the second-level cache; no memory need be there."""

    @intrinsic
    def fetch(_: Any, address: Any) -> Any:
        def generate(context: Any, builder: Builder, __: Any, arguments: Any) -> Value:
            fetch_lines(builder, pointer(builder, arguments[0]), size)
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return fetch


@intrinsic
def pause(_: Any) -> Any:
    """Tells the processor that this is a loop that waits."""

    def generate(context: Any, builder: Builder, __: Any, ___: Any) -> Value:
        call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def yield_processor(_: Any) -> Any:
    """sched_yield."""

    def generate(_: Any, builder: Builder, __: Any, ___: Any) -> Value:
        return call(builder, "sched_yield", I32, [])

    return types.int32(), generate


def _semaphore_function(name: str) -> Any:
    @intrinsic
    def function(_: Any, address: Any) -> Any:
        def generate(_: Any, builder: Builder, __: Any, arguments: Any) -> Value:
            return call(builder, name, I32, [pointer(builder, arguments[0])])

        return types.int32(types.int64), generate

    return function


semaphore_post, semaphore_wait = _semaphore_function("sem_post"), _semaphore_function("sem_wait")


@intrinsic
def call_address(_: Any, address: Any, arguments: Any) -> Any:
    """Calls a function of the library at its address, with a tuple of int64.

    Called by name it would be compiled again within each caller and the caller's callers.
    """

    def generate(context: Any, builder: Builder, signature: Any, values: Any) -> Value:
        address, packed = values
        unpacked = [builder.extract_value(packed, index) for index in range(signature.args[1].count)]
        kind = ir.FunctionType(ir.VoidType(), [I64] * len(unpacked))
        builder.call(builder.inttoptr(address, kind.as_pointer()), unpacked)
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, len(arguments))), generate
