"""Compiles kernels, each once, and keeps the machine code on disk: compiling takes ten times as long as loading.

What is kept is named by everything it depends on: the kernels' source, numba, the processor and what they are made for.
"""

import inspect
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba import cfunc, types
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys

log = logging.getLogger(__name__)

Sources = Mapping[str, Callable[..., None]]


@dataclass(frozen=True, slots=True)
class Library:
    """Addresses of compiled functions by name; the code lives as long as this does."""

    addresses: Mapping[str, int]
    keeps: tuple[Any, ...]


def compiled_library(sources: Callable[[], Sources], made_for: str, folder: Path | None) -> Library:
    """The functions that `sources` gives, whose arguments are all int64, compiled now or loaded from `folder`.

    `made_for` says what else than the kernels' source the functions depend on. A folder that cannot be read or written
    costs the time to compile, and is logged.
    """
    if folder is None:
        return _compile(sources())[0]
    file = folder / f"{_name(made_for)}.zip"
    try:
        return _load(file)
    except FileNotFoundError:
        log.info("compiling kernels for this processor")
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, RuntimeError) as error:
        log.warning("compiling kernels again, since %s cannot be used: %s", file, error)
    library, code = _compile(sources())
    try:
        _save(file, code)
    except OSError as error:
        log.warning("compiled kernels cannot be kept, so each start compiles them: %s", error)
    return library


@dataclass(frozen=True, slots=True)
class _Code:
    symbol: str
    object_code: bytes
    bitcode: bytes


def _compile(sources: Sources) -> tuple[Library, dict[str, _Code]]:
    done: dict[Callable[..., None], Any] = {}
    for function in sources.values():
        if function not in done:
            arguments = len(inspect.signature(function).parameters)
            signature = types.void(*[types.int64] * arguments)
            done[function] = cfunc(signature, nopython=True, error_model="numpy")(function)
    kernels = {name: done[function] for name, function in sources.items()}
    code = {}
    for name, kernel in kernels.items():
        # numba's own way to keep code is tied to one source file per function, and cannot see what that imports.
        _, _, (object_code, bitcode) = kernel._library.serialize_using_object_code()
        code[name] = _Code(kernel.native_name, object_code, bitcode)
    return Library({name: kernel.address for name, kernel in kernels.items()}, tuple(done.values())), code


def _name(made_for: str) -> str:
    digest = sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    processor = f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    compiled_for = f"{numba.config.CPU_NAME} {numba.config.CPU_FEATURES}"
    for part in (numba.__version__, llvmlite.__version__, processor, compiled_for, made_for):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def _save(file: Path, code: Mapping[str, _Code]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as unfinished:
        with zipfile.ZipFile(unfinished, "w") as archive:
            for name, each in code.items():
                archive.writestr(f"{name}/symbol", each.symbol)
                archive.writestr(f"{name}/object", each.object_code)
                archive.writestr(f"{name}/bitcode", each.bitcode)
    os.replace(unfinished.name, file)


def _load(file: Path) -> Library:
    rtsys.initialize(cpu_target.target_context)  # what array code refers to
    codegen = cpu_target.target_context.codegen()
    addresses, keeps = {}, []
    with zipfile.ZipFile(file) as archive:
        for name in sorted({entry.split("/")[0] for entry in archive.namelist()}):
            code = archive.read(f"{name}/object"), archive.read(f"{name}/bitcode")
            library = codegen.unserialize_library((name, "object", code))
            addresses[name] = library.get_pointer_to_function(archive.read(f"{name}/symbol").decode())
            keeps.append(library)
    if not all(addresses.values()):
        raise ValueError("it lacks a function")
    return Library(addresses, tuple(keeps))
