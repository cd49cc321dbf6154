"""Compiled kernels as functions that Python can call, compiled once per run of the tests."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from services.worker.engine.kernels.compiled.isa import choose_isa
from services.worker.engine.kernels.compiled.library import archive_of, compile_kernels, load_kernels

ISA = choose_isa()


@cache
def compiled(make: Callable[..., Callable[..., None]], *arguments: Any, **settings: Any) -> Callable[..., None]:
    """What `make(ISA, ...)` makes, taking arrays too, whose addresses it gets. Python's lock is not held meanwhile."""
    library = load_kernels(archive_of(compile_kernels({"kernel": make(ISA, *arguments, **settings)})))

    def call(*arguments: int | npt.NDArray[Any]) -> None:
        numbers = [argument.ctypes.data if isinstance(argument, np.ndarray) else argument for argument in arguments]
        ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(numbers))(library.addresses["kernel"])(*numbers)

    return call
