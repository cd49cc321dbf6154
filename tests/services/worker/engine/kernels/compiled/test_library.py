"""Compiled code is kept on disk, and never trusted further than it can be read."""

import ctypes
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit, types
from numba.core.bytecode import FunctionIdentity
from numba.extending import intrinsic

from services.worker.engine.kernels.compiled.library import (
    Library,
    Sources,
    archive_of,
    compile_kernels,
    kept_library,
    load_kernels,
)
from services.worker.engine.kernels.compiled.machine import longs


@intrinsic
def not_inlined(_: Any) -> Any:
    """Has the function that says it stay a function of its own."""

    def generate(context: Any, builder: Any, *_: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


class Kernels:
    """Two functions, one under two names; counts how often they were asked for."""

    def __init__(self, step: int = 1) -> None:
        self.asked = 0
        self._step = step

    def __call__(self) -> bytes:
        self.asked += 1
        return archive_of(compile_kernels(self._sources()))

    def _sources(self) -> Sources:
        step = self._step

        @njit  # type: ignore[untyped-decorator]
        def times_step(amount: int) -> int:
            not_inlined()
            return step * amount

        def add(address: int, amount: int) -> None:
            longs(address, 1)[0] += times_step(amount)

        def clear(address: int) -> None:
            longs(address, 1)[0] = 0

        return {"ADD": add, "CLEAR": clear, "AGAIN": add}


def works(library: Library, step: int = 1) -> bool:
    number = np.array([40], np.int64)
    functions = {name: ctypes.CFUNCTYPE(None)(address) for name, address in library.addresses.items()}
    at = ctypes.c_int64(number.ctypes.data)
    functions["ADD"](at, ctypes.c_int64(1))
    functions["AGAIN"](at, ctypes.c_int64(1))
    added = number[0] == 40 + 2 * step
    functions["CLEAR"](at)
    return bool(added and number[0] == 0)


def test_nothing_is_kept_without_a_folder() -> None:
    kernels = Kernels()
    assert works(kept_library(kernels, "", None))
    assert kernels.asked == 1


def test_the_second_time_they_are_loaded(tmp_path: Path) -> None:
    kernels = Kernels()
    for _ in range(3):
        assert works(kept_library(kernels, "test", tmp_path / "new" / "folder"))
    assert kernels.asked == 1
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 1


def test_what_they_are_made_for_counts(tmp_path: Path) -> None:
    for step in (1, 2):
        assert works(kept_library(Kernels(step), f"step {step}", tmp_path), step)
    for step in (1, 2):
        assert works(kept_library(Kernels(step), f"step {step}", tmp_path), step)
    assert len(list(tmp_path.iterdir())) == 2


def test_two_libraries_of_equal_names_keep_apart(tmp_path: Path) -> None:
    for _ in range(2):  # compiled, then loaded
        libraries = [kept_library(Kernels(step), f"step {step}", tmp_path) for step in (1, 2, 3)]
        assert all(works(library, step) for step, library in zip((1, 2, 3), libraries, strict=True))


def test_libraries_whose_functions_are_named_alike_keep_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of two processes are: numba numbers what it compiles."""
    archives = {}
    for step in (1, 2, 3):
        monkeypatch.setattr(FunctionIdentity, "_unique_ids", itertools.count(10**6))
        archives[step] = Kernels(step)()
    for step, archive in archives.items():
        assert works(load_kernels(archive), step)


@pytest.mark.parametrize("spoil", [b"", b"spoilt", None], ids=["empty", "no archive", "cut short"])
def test_a_spoilt_file_is_replaced(spoil: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept_library(Kernels(), "test", tmp_path)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000] if spoil is None else spoil)
    kernels = Kernels()
    with caplog.at_level(logging.WARNING):
        assert works(kept_library(kernels, "test", tmp_path))
    assert kernels.asked == 1
    assert f"compiling kernels again, since {file} cannot be used" in caplog.text
    assert works(kept_library(kernels, "test", tmp_path))
    assert kernels.asked == 1


def test_a_folder_that_cannot_be_written_costs_the_time_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert works(kept_library(Kernels(), "test", tmp_path / "file"))
    assert "each start compiles them" in caplog.text
